"""Transformer encoder with torch.nn's interface."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import functional
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.linear import is_plain


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` on the fused kernels, in training with dropout too.

    Its arguments, initial values and state_dict are torch's. Results agree with torch's training
    path: outputs at padded positions are ordinary values, where torch's inference path on nested
    tensors gives zeros.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        self.self_attn.__class__ = MultiheadAttention  # torch's __init__ has no argument for it

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src ``[B, S, E]`` with batch_first, else ``[S, B, E]``, or ``[S, E]`` -> the same shape.

        The masks are ``MultiheadAttention``'s attn_mask and key_padding_mask; ``is_causal``
        promises that src_mask is the causal one.
        """
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))

    def _ff_block(self, x: Tensor) -> Tensor:
        if not self._relu() or not is_plain(self.linear1, nn.Linear):
            return super()._ff_block(x)
        up, down = self.linear1, self.linear2
        no_dropout = is_plain(self.dropout, nn.Dropout) and not (
            self.dropout.training and self.dropout.p > 0.0
        )
        if no_dropout and is_plain(down, nn.Linear):
            x = functional.mlp(x, [up.weight, down.weight], [up.bias, down.bias])
        else:
            x = down(self.dropout(functional.linear_relu(x, up.weight, up.bias)))
        return self.dropout2(x)

    def _relu(self) -> bool:
        """Whether the activation is ReLU, and may be done inside a kernel."""
        if isinstance(self.activation, nn.Module):
            return is_plain(self.activation, nn.ReLU)
        return self.activation in (F.relu, torch.relu)


class TransformerEncoder(nn.TransformerEncoder):
    """A stack of encoder layers, ``torch.nn.TransformerEncoder``'s arguments and state_dict.

    ``encoder_layer`` may be fastattn's, or torch's own, which then runs torch's code until
    ``fastattn.patch`` swaps it. ``enable_nested_tensor`` and ``mask_check`` have no effect: no
    nested tensor is made, and outputs at padded positions are ordinary values.
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
        """src and masks as in the layers; ``is_causal=None`` looks whether mask is causal."""
        if is_causal is None:
            is_causal = _is_causal(mask)
        x = src
        for layer in self.layers:
            x = layer(
                x, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal
            )
        return x if self.norm is None else self.norm(x)


def _is_causal(mask: Tensor | None) -> bool:
    """Whether the mask, True or -inf where masked out, is exactly the causal one."""
    if mask is None or mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    if torch.compiler.is_compiling() or mask.device.type == "meta":
        return False  # reading values would break the graph; the mask itself gives the same result
    if mask.dtype != torch.bool and mask.requires_grad:
        return False  # a learned bias: only the mask itself gets the gradient
    above = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, above)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(above, -math.inf))
