"""Attention over packed sequences."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import backends, ops, reference
from fastattn.functional import _validate
from fastattn.functional._autograd import apply, autocast
from fastattn.functional._broadcast import broadcast, padded_head_dim
from fastattn.functional.attention import AttentionFunction


@overload
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = ...,
    scale: float | None = ...,
    *,
    dropout_p: float = ...,
    window_size: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = ...,
    scale: float | None = ...,
    *,
    dropout_p: float = ...,
    window_size: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = ...,
    scale: float | None = ...,
    *,
    dropout_p: float = ...,
    window_size: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    return_lse: bool = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    dropout_p: float = 0.0,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each of B packed sequences with itself, ``[total_q, Hq, Dv]``.

    The names are those of ``torch.nn.attention.varlen.varlen_attn``.

    Args:
        query: ``[total_q, Hq, D]``, floating point.
        key: ``[total_k, Hk, D]``, Hk a divisor of Hq.
        value: ``[total_k, Hv, Dv]``, Hv a divisor of Hq.
        cu_seq_q: int32 or int64 ``[B + 1]``, in tokens: where each sequence of query starts, and
            total_q at the end.
        cu_seq_k: the same for key and value.
        max_q: an upper bound of the lengths in query, in tokens. On a GPU neither the bounds nor
            the starts are compared with the data, which would wait for the GPU; nothing is read
            out of bounds.
        max_k: the same for key and value.
        is_causal: query i of a sequence sees its keys j <= i (top-left aligned).
        scale: finite; ``1/sqrt(D)`` by default.
        dropout_p: as in ``scaled_dot_product_attention``.
        window_size: as in ``scaled_dot_product_attention``, within each sequence.
        softcap: as in ``scaled_dot_product_attention``.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``: adds -slope·|i-j|, i and j counted in each sequence.
        return_lse: also return the log-sum-exp of each row.
        backend: as in ``scaled_dot_product_attention``.

    Returns:
        ``[total_q, Hq, Dv]`` in query's dtype. With ``return_lse`` also the LSE, ``[Hq, total_q]``,
        natural logarithm, float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or number that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: ``backend`` names one that cannot serve the call.

    >>> import torch, fastattn
    >>> query, key, value = torch.randn(3, 10, 4, 32)  # 10 tokens: sequences of 3 and of 7
    >>> starts = torch.tensor([0, 3, 10])
    >>> fastattn.varlen_attn(query, key, value, starts, starts, 7, 7).shape
    torch.Size([10, 4, 32])
    """
    _validate.tensor("query", query)
    query, key, value = autocast(query, key, value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        _validate.tensor(name, x)
        if x.dim() != 3:
            raise ValueError(
                f"{name}: expected 3 dimensions [tokens, heads, dim], got {tuple(x.shape)}"
            )
    dropout_p = _validate.probability("dropout_p", dropout_p)
    window_size, softcap = _validate.window(window_size), _validate.softcap(softcap)
    max_q, max_k = _validate.longest("max_q", max_q), _validate.longest("max_k", max_k)
    _validate.sequence_starts("cu_seq_q", cu_seq_q, query)
    _validate.sequence_starts("cu_seq_k", cu_seq_k, query)
    if cu_seq_q.shape != cu_seq_k.shape:
        raise ValueError(
            f"cu_seq_k: expected {cu_seq_q.shape[0]} entries as cu_seq_q, got {cu_seq_k.shape[0]}"
        )
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # [heads, tokens, dim]
    _validate.attention(query, key, value, enable_gqa=True)
    if alibi_slopes is not None:
        _validate.slopes(alibi_slopes, query, cu_seq_q.shape[0] - 1)
    if scale is None:
        scale = 1.0 / math.sqrt(max(1, query.shape[-1]))
    scale = _validate.number("scale", scale)
    query, key, value = broadcast(query, key, value, enable_gqa=True)
    query, key = padded_head_dim(query, key)
    problem = backends.attention_problem(
        "varlen_attn", query, key, value, alibi_slopes=alibi_slopes
    )
    chosen = backends.select(problem, backend)
    if not query.is_cuda:
        _check_starts("cu_seq_q", cu_seq_q, query.shape[-2], "max_q", max_q)
        _check_starts("cu_seq_k", cu_seq_k, key.shape[-2], "max_k", max_k)
    drops_all, seed = dropout_p == 1.0, None
    if drops_all:
        dropout_p = 0.0
    elif dropout_p > 0.0:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    if chosen == "reference":
        out, lse = _reference(
            query,
            key,
            value,
            cu_seq_q,
            cu_seq_k,
            alibi_slopes,
            seed=seed,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            window_size=window_size,
            softcap=softcap,
        )
    else:
        options = ops.Options(is_causal, scale, dropout_p, *window_size, softcap, max_q, max_k)
        call = ops.Call(options, backends.kernels_of(chosen))
        query, key, value = (x[None] for x in (query, key, value))
        out, lse, *_ = apply(
            AttentionFunction, call, query, key, value, None, alibi_slopes, seed, cu_seq_q, cu_seq_k
        )
        out, lse = out[0], lse[0]
    out = out.transpose(0, 1)
    if drops_all:
        out = out * 0.0  # as scaled_dot_product_attention does
    return (out, lse) if return_lse else out


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    slopes: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out ``[Hq, total_q, Dv]``, LSE ``[Hq, total_q]``, a sequence at a time."""
    ends = [itertools.pairwise(starts.tolist()) for starts in (starts_q, starts_k)]
    spans = list(zip(*ends, strict=True))
    if not spans:  # one sequence of length 0 has the shapes and dtypes of none
        spans, slopes = [((0, 0), (0, 0))], None
    results = []
    for b, (span_q, span_k) in enumerate(spans):
        rows_q, rows_k = slice(*span_q), slice(*span_k)
        result = reference.attention(
            query[:, rows_q],
            key[:, rows_k],
            value[:, rows_k],
            first_batch=b,
            alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
            **options,
        )
        results.append(result)
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def _check_starts(
    argument: str, starts: Tensor, tokens: int, max_argument: str, longest: int
) -> None:
    values = starts.tolist()
    if values[0] != 0 or values[-1] != tokens or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(
            f"{argument}: expected non-decreasing starts from 0 to {tokens}, got {values}"
        )
    lengths = [b - a for a, b in itertools.pairwise(values)]
    if lengths and max(lengths) > longest:
        raise ValueError(f"{max_argument}: expected at least {max(lengths)}, got {longest}")
