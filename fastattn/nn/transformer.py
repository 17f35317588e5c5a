"""Transformer encoder with torch.nn's interface."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.linear import is_plain


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` on the fused kernels, in training with dropout too.

    Its arguments and state_dict are torch's. Results agree with torch's training path: outputs at padded positions are
    ordinary values, where torch's inference path on nested tensors gives zeros.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src ``[B, S, E]`` with batch_first, else ``[S, B, E]``, or ``[S, E]`` -> the same shape."""
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))

    def _ff_block(self, x: Tensor) -> Tensor:
        relu = self.activation is nn.functional.relu or isinstance(self.activation, nn.ReLU)
        plain = is_plain(self.linear1, nn.Linear) and is_plain(self.linear2, nn.Linear)
        if not relu or not plain:
            return super()._ff_block(x)
        if not self.training or self.dropout.p == 0.0:
            x = functional.mlp(
                x,
                [self.linear1.weight, self.linear2.weight],
                [self.linear1.bias, self.linear2.bias],
            )
        else:
            hidden = functional.linear_relu(x, self.linear1.weight, self.linear1.bias)
            x = self.linear2(self.dropout(hidden))
        return self.dropout2(x)


class TransformerEncoder(nn.TransformerEncoder):
    """A stack of encoder layers, ``torch.nn.TransformerEncoder``'s arguments and state_dict.

    ``enable_nested_tensor`` is accepted and has no effect: padded keys are skipped by the kernels.
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """src as in the layers; ``is_causal=None`` looks whether ``mask`` is causal."""
        if is_causal is None:
            is_causal = _is_causal(mask)
        x = src
        for layer in self.layers:
            x = layer(
                x, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal
            )
        return x if self.norm is None else self.norm(x)


def _is_causal(mask: Tensor | None) -> bool:
    """Whether the mask (torch.nn's meaning: True or -inf is masked out) is exactly the causal one."""
    if mask is None or mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    if torch.compiler.is_compiling() or mask.device.type == "meta":
        return False  # reading the values would break the graph; the mask itself gives the same result
    above = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype == torch.bool:
        return bool(torch.equal(mask, above))
    return bool(torch.equal(mask, torch.zeros_like(mask).masked_fill(above, float("-inf"))))
