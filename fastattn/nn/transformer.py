"""A layer of a Transformer encoder with torch.nn's interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import functional
from fastattn.functional._served import (
    epilogue_wins,
    is_small_product,
    ordinary,
    serves_layers,
    serves_norm,
    unobserved,
)
from fastattn.nn._packed import Packing
from fastattn.nn._plain import (
    as_written,
    fused_activation,
    is_plain,
    no_global_hooks,
    run_torchs,
    scripted_as,
    was_swapped,
)
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.dropout import fused_dropout
from fastattn.nn.linear import is_plain_linear

_SA_BLOCK = nn.TransformerEncoderLayer._sa_block


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` on the fused kernels, in training with dropout too.

    Its arguments, initial values and state_dict are torch's. Results agree with torch's training
    path: outputs at padded positions are ordinary values, where torch's inference path on nested
    tensors gives zeros. Unusual inputs, children and modes run torch's own forward.

    Args:
        d_model: E, size of a token.
        nhead: number of heads, a divisor of E.
        dim_feedforward: width of the hidden layer.
        dropout: probability of dropping an element in training.
        activation: ``"relu"``, ``"gelu"`` or a function of a tensor; ReLU, GELU and SiLU have fused
            kernels.
        layer_norm_eps: added to the variance in both norms.
        batch_first: tensors are ``[B, S, E]`` instead of ``[S, B, E]``.
        norm_first: normalise before attention and feed-forward, not after.
        bias: learn biases of the linear layers and norms.
        device: of the parameters.
        dtype: of the parameters.

    >>> import torch, fastattn
    >>> layer = fastattn.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    >>> layer(torch.randn(2, 16, 64)).shape
    torch.Size([2, 16, 64])
    """

    __prepare_scriptable__ = scripted_as(nn.TransformerEncoderLayer)

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
        """Self-attention and feed-forward, each with its residual and norm.

        Args:
            src: ``[B, S, E]`` with batch_first, else ``[S, B, E]``, or ``[S, E]``.
            src_mask: attn_mask of ``MultiheadAttention``.
            src_key_padding_mask: key_padding_mask of ``MultiheadAttention``.
            is_causal: a promise that src_mask is the causal mask.

        Returns:
            A tensor of src's shape.
        """
        given = (src, src_mask, src_key_padding_mask)
        usual = unobserved() and ordinary(*given, exported=not was_swapped(self))
        if not usual or (was_swapped(self) and not self._as_torch_does(*given, is_causal)):
            return run_torchs(self, super().forward, src, src_mask, src_key_padding_mask, is_causal)

        def attended(x: Tensor) -> Tensor:
            options = {"need_weights": False, "is_causal": is_causal}
            return self.self_attn(x, x, x, src_key_padding_mask, attn_mask=src_mask, **options)[0]

        def sa_block(x: Tensor) -> Tensor:
            return self._sa_block(x, src_mask, src_key_padding_mask, is_causal)

        return self._joined(src, attended, sa_block)

    def _of_packed(self, x: Tensor, packing: Packing, is_causal: bool) -> Tensor:
        """The layer of packed tokens ``[T, E]``."""
        attention: Any = self.self_attn

        def attended(x: Tensor) -> Tensor:
            return attention._of_packed(x, packing, is_causal)

        return self._joined(x, attended, lambda x: self.dropout1(attended(x)))

    def _takes_packed(self, x: Tensor) -> bool:
        """Whether packed tokens ``[T, E]`` give what the padded batch gives at its tokens."""
        attention: Any = self.self_attn
        return attention._takes_packed(x) and self._as_torch_does(x, None, None, False)

    def _joined(
        self, x: Tensor, attended: Callable[[Tensor], Tensor], sa_block: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The layer, given attention without the dropout behind it and with it."""
        if self._dropout_is_fused(x):
            return self._with_fused_dropout(x, attended)
        if self.norm_first:
            x = x + sa_block(self.norm1(x))
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + sa_block(x))
        return self.norm2(x + self._ff_block(x))

    def _as_torch_does(
        self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> bool:
        """Whether torch's forward would give what the code above gives. At inference torch reads
        the parameters and flags of the children and does not call them, and it takes some float
        masks for bool ones."""
        children = (self.dropout, self.dropout1, self.dropout2, self.self_attn)
        if (
            not as_written(nn.TransformerEncoderLayer)
            or not is_plain(self.self_attn, MultiheadAttention)
            or not no_global_hooks()
            or not self._activation_as_declared()
            or not (self.training or not any(m.training for m in children))
            or (is_causal and mask is None)
            or not (self.training or is_causal or _bool_or_none(mask, padding))
            or src.dim() not in (2, 3)
        ):
            return False
        batch_dim = 0 if self.self_attn.batch_first else 1
        batch, length = (
            (1, src.shape[0])
            if src.dim() == 2
            else (src.shape[batch_dim], src.shape[1 - batch_dim])
        )
        square = (length, length)
        full = (batch * self.self_attn.num_heads, *square)
        padded = (length,) if src.dim() == 2 else (batch, length)
        return (mask is None or tuple(mask.shape) in (square, full)) and (
            padding is None or tuple(padding.shape) == padded
        )

    def _activation_as_declared(self) -> bool:
        """Whether the activation is the one that torch's inference path takes it for."""
        activation, declared = self.activation, self.activation_relu_or_gelu
        if declared == 1:
            return activation is F.relu or type(activation) is nn.ReLU
        if declared == 2:
            exact = type(activation) is nn.GELU and activation.approximate == "none"
            return activation is F.gelu or exact
        return True

    def _dropout_is_fused(self, x: Tensor) -> bool:
        """Whether a kernel may drop the elements of both blocks, add the residual and normalise,
        and is faster: where something is dropped. A subclass, or a layer, may have blocks of its
        own."""
        norms, drops = (self.norm1, self.norm2), (self.dropout1, self.dropout2)
        return (
            getattr(self._sa_block, "__func__", None) is _SA_BLOCK
            and getattr(self._ff_block, "__func__", None) is TransformerEncoderLayer._ff_block
            and all(fused_dropout(self, drop) for drop in drops)
            and all(is_plain(norm, nn.LayerNorm) for norm in norms)
            and all(norm.normalized_shape == x.shape[-1:] for norm in norms)
            and no_global_hooks()
            and serves_norm(x, self.norm1.weight, self.norm1.bias)
            and serves_norm(x, self.norm2.weight, self.norm2.bias)
        )

    def _with_fused_dropout(self, x: Tensor, attended: Callable[[Tensor], Tensor]) -> Tensor:
        norm1, norm2 = self.norm1, self.norm2
        p1, p2 = self.dropout1.p, self.dropout2.p
        if self.norm_first:
            x, total = functional.dropout_add_norm(
                attended(norm1(x)), x, norm2.weight, norm2.bias, p1, norm2.eps, prenorm=True
            )
            return total + functional.activation_dropout(self._fed(x), None, p2)
        x = functional.dropout_add_norm(attended(x), x, norm1.weight, norm1.bias, p1, norm1.eps)
        return functional.dropout_add_norm(self._fed(x), x, norm2.weight, norm2.bias, p2, norm2.eps)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self._fed(x))

    def _fed(self, x: Tensor) -> Tensor:
        """The feed-forward without its last dropout."""
        up, down, drop = self.linear1, self.linear2, self.dropout
        name, exported = fused_activation(self.activation), not was_swapped(self)
        if (
            name is None
            or not is_plain_linear(up)
            or not no_global_hooks()
            or not unobserved()
            or not ordinary(x, exported=exported)
            or not serves_layers(x, [up.weight], [up.bias], exported)
        ):
            return down(drop(self.activation(up(x))))
        p = fused_dropout(self, drop)
        if name == "relu" and p == 0.0 and is_plain_linear(down):
            weights, biases = [up.weight, down.weight], [up.bias, down.bias]
            if serves_layers(x, weights, biases, exported):
                return functional.mlp(x, weights, biases)
        if is_small_product(x, up.weight.numel()) or not (p or epilogue_wins(x, name)):
            return down(drop(self.activation(up(x))))
        hidden = functional.linear(x, up.weight, up.bias, name, p or 0.0)
        return down(hidden if p is not None else drop(hidden))


def _bool_or_none(*masks: Tensor | None) -> bool:
    return all(m is None or m.dtype == torch.bool for m in masks)
