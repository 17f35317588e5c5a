"""Attention ops: query ``[*, Hq, Sq, D]``, key ``[*, Hk, Sk, D]``, value ``[*, Hk, Sk, Dv]``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn import _extension


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out ``[*, Hq, Sq, Dv]``, LSE ``[*, Hq, Sq]``. attn_mask has query's rank; seed is int64
    ``[1]``."""
    return torch.ops.fastattn.attention_forward(
        query, key, value, attn_mask, seed, is_causal, scale, dropout_p
    )


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the float mask; one that is not needed has shape
    ``[0]``."""
    return torch.ops.fastattn.attention_backward(
        grad_out,
        grad_lse,
        query,
        key,
        value,
        attn_mask,
        out,
        lse,
        seed,
        is_causal,
        scale,
        dropout_p,
        needs,
    )


if _extension.HAS_NATIVE:

    @torch.library.register_fake("fastattn::attention_forward")
    def _(query, key, value, attn_mask, seed, is_causal, scale, dropout_p):
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return out, query.new_empty(query.shape[:-1], dtype=dtype)

    @torch.library.register_fake("fastattn::attention_backward")
    def _(
        grad_out, grad_lse, query, key, value, attn_mask, out, lse, seed, causal, scale, p, needs
    ):
        like = (query, key, value, attn_mask)
        return tuple(
            query.new_empty(x.shape if need else (0,)) for x, need in zip(like, needs, strict=True)
        )
