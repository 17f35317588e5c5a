"""Attention ops: query ``[*, Hq, Sq, D]``, key ``[*, Hk, Sk, D]``, value ``[*, Hk, Sk, Dv]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import _extension
from fastattn.ops.triton import library as _  # noqa: F401


class Options(NamedTuple):
    """The numbers among an attention call's extras."""

    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    max_q: int = 0  # the longest of the packed sequences
    max_k: int = 0


NO_OPTIONS = Options()


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    slopes: Tensor | None = None,
    starts_q: Tensor | None = None,
    starts_k: Tensor | None = None,
    options: Options = NO_OPTIONS,
    backend: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out ``[*, Hq, Sq, Dv]``, LSE ``[*, Hq, Sq]``, and the LSE's parts row_max and log_sum, in the
    kernels' own unit of scores: the derivatives take them, so that rows of P sum to 1 however large
    the scores. attn_mask has query's rank; seed is int64 ``[1]``; slopes is ``[Hq]`` or
    ``[B, Hq]``. Beside starts_q and starts_k ``[B + 1]`` query is ``[1, Hq, tokens, D]``."""
    left, right, softcap, max_q, max_k = options
    if backend != "triton":  # one op, dispatched by device
        return torch.ops.fastattn.attention_forward(
            query, key, value, attn_mask, _in_lse_dtype(slopes, query), seed, starts_q, starts_k,
            is_causal, scale, dropout_p, left, right, softcap,
        )  # fmt: skip
    return torch.ops.fastattn_triton.attention_forward(
        query, key, value, attn_mask, slopes, seed, starts_q, starts_k, max_q, max_k, is_causal,
        scale, dropout_p, left, right, softcap,
    )  # fmt: skip


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    needs: Sequence[bool],
    slopes: Tensor | None = None,
    starts_q: Tensor | None = None,
    starts_k: Tensor | None = None,
    options: Options = NO_OPTIONS,
    backend: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the float mask; one that is not needed has shape
    ``[0]``."""
    left, right, softcap, max_q, max_k = options
    if backend != "triton":  # one op, dispatched by device
        return torch.ops.fastattn.attention_backward(
            grad_out, grad_lse, query, key, value, attn_mask, _in_lse_dtype(slopes, query), out,
            row_max, log_sum, seed, starts_q, starts_k, is_causal, scale, dropout_p, left, right,
            softcap, needs,
        )  # fmt: skip
    return torch.ops.fastattn_triton.attention_backward(
        grad_out, grad_lse, query, key, value, attn_mask, slopes, out, row_max, log_sum, seed,
        starts_q, starts_k, max_q, max_k, is_causal, scale, dropout_p, left, right, softcap, needs,
    )  # fmt: skip


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    t_query: Tensor | None,
    t_key: Tensor | None,
    t_value: Tensor | None,
    t_mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    slopes: Tensor | None = None,
    starts_q: Tensor | None = None,
    starts_k: Tensor | None = None,
    options: Options = NO_OPTIONS,
    backend: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The tangents of out and LSE; those of the inputs have their shapes, None for 0."""
    left, right, softcap, max_q, max_k = options
    if backend != "triton":  # one op, dispatched by device
        return torch.ops.fastattn.attention_jvp(
            query, key, value, attn_mask, _in_lse_dtype(slopes, query), t_query, t_key, t_value,
            t_mask, out, row_max, log_sum, seed, starts_q, starts_k, is_causal, scale, dropout_p,
            left, right, softcap,
        )  # fmt: skip
    return torch.ops.fastattn_triton.attention_jvp(
        query, key, value, attn_mask, slopes, t_query, t_key, t_value, t_mask, out, row_max,
        log_sum, seed, starts_q, starts_k, max_q, max_k, is_causal, scale, dropout_p, left, right,
        softcap,
    )  # fmt: skip


def attention_double_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    t_query: Tensor | None,
    t_key: Tensor | None,
    t_value: Tensor | None,
    t_mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    needs: Sequence[bool],
    slopes: Tensor | None = None,
    starts_q: Tensor | None = None,
    starts_k: Tensor | None = None,
    options: Options = NO_OPTIONS,
    backend: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tangents of out and LSE, and attention_backward's derivatives in the direction of the
    tangents; needs: of (the former, query, key, value, float mask), and what is not needed has
    shape ``[0]``."""
    left, right, softcap, max_q, max_k = options
    if backend != "triton":  # one op, dispatched by device
        return torch.ops.fastattn.attention_double_backward(
            grad_out, grad_lse, query, key, value, attn_mask, _in_lse_dtype(slopes, query), t_query,
            t_key, t_value, t_mask, out, row_max, log_sum, seed, starts_q, starts_k, is_causal,
            scale, dropout_p, left, right, softcap, needs,
        )  # fmt: skip
    return torch.ops.fastattn_triton.attention_double_backward(
        grad_out, grad_lse, query, key, value, attn_mask, slopes, t_query, t_key, t_value, t_mask,
        out, row_max, log_sum, seed, starts_q, starts_k, max_q, max_k, is_causal, scale, dropout_p,
        left, right, softcap, needs,
    )  # fmt: skip


def _in_lse_dtype(slopes: Tensor | None, query: Tensor) -> Tensor | None:
    if slopes is None:
        return None
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return slopes if slopes.dtype == dtype else slopes.to(dtype)


def _rows(x: Tensor, head_dim: int, packed: bool) -> Tensor:
    if packed:
        batch, heads, tokens, _ = x.shape
        return x.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)
    return x.new_empty((*x.shape[:-1], head_dim))


def _fake_forward(query, key, value, attn_mask, slopes, seed, starts_q, *rest):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = _rows(query, value.shape[-1], starts_q is not None)
    return out, *[query.new_empty(query.shape[:-1], dtype=dtype) for _row in range(3)]


def _fake_backward(
    grad_out, grad_lse, query, key, value, attn_mask, slopes, out, row_max, log_sum, seed, starts_q,
    *rest,
):  # fmt: skip
    packed, needs, like = starts_q is not None, rest[-1], (query, key, value)
    grads = [
        _rows(x, x.shape[-1], packed) if need else query.new_empty((0,))
        for x, need in zip(like, needs[:3], strict=True)
    ]
    return (*grads, query.new_empty(attn_mask.shape if needs[3] else (0,)))


def _fake_jvp(
    query, key, value, attn_mask, slopes, t_query, t_key, t_value, t_mask, out, row_max, log_sum,
    seed, starts_q, *rest,
):  # fmt: skip
    return _rows(query, value.shape[-1], starts_q is not None), query.new_empty(
        query.shape[:-1], dtype=row_max.dtype
    )


def _fake_double_backward(
    grad_out, grad_lse, query, key, value, attn_mask, slopes, t_query, t_key, t_value, t_mask, out,
    row_max, log_sum, seed, starts_q, *rest,
):  # fmt: skip
    packed, needs, like = starts_q is not None, rest[-1], (query, key, value)
    grads = [
        _rows(x, x.shape[-1], packed) if need else query.new_empty((0,))
        for x, need in zip(like, needs[1:4], strict=True)
    ]
    return (
        _rows(query, value.shape[-1], packed) if needs[0] else query.new_empty((0,)),
        row_max.new_empty(query.shape[:-1] if needs[0] else (0,)),
        *grads,
        query.new_empty(attn_mask.shape if needs[4] else (0,)),
    )


for _namespace in ["fastattn_triton", *(["fastattn"] if _extension.HAS_NATIVE else [])]:
    torch.library.register_fake(f"{_namespace}::attention_forward", _fake_forward)
    torch.library.register_fake(f"{_namespace}::attention_backward", _fake_backward)
    torch.library.register_fake(f"{_namespace}::attention_jvp", _fake_jvp)
    torch.library.register_fake(f"{_namespace}::attention_double_backward", _fake_double_backward)
