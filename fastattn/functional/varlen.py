"""Attention over packed sequences."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fastattn import backends
from fastattn.functional import _validate
from fastattn.functional._autograd import apply, autocast
from fastattn.functional.attention import (
    AttentionFunction,
    kernel_options,
    scaled_dot_product_attention,
)


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
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each of B packed sequences with itself; names as
    ``torch.nn.attention.varlen.varlen_attn``.

    Args:
        query: ``[total_q, Hq, D]``; key: ``[total_k, Hk, D]``; value: ``[total_k, Hk, Dv]``; Hk
        divides Hq.
        cu_seq_q, cu_seq_k: int32 or int64 ``[B + 1]``: where each sequence starts, and the total
        at the end.
        max_q, max_k: upper bounds of the lengths. On a GPU neither they nor the starts are compared
            with the data, which would wait for it; nothing is read out of bounds.
        is_causal, scale, dropout_p, window_size, softcap, alibi_slopes, return_lse, backend: as in
            ``scaled_dot_product_attention``; the causal mask is top-left aligned in each sequence.

    Returns:
        ``[total_q, Hq, Dv]`` (and the LSE, ``[Hq, total_q]``).
    """
    _validate.tensor("query", query)
    query, key, value = autocast(query, key, value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        _validate.tensor(name, x)
        if x.dim() != 3:
            raise ValueError(
                f"{name}: expected 3 dimensions [tokens, heads, dim], got {tuple(x.shape)}"
            )
    _validate.probability("dropout_p", dropout_p)
    _validate.sequence_starts("cu_seq_q", cu_seq_q, query)
    _validate.sequence_starts("cu_seq_k", cu_seq_k, query)
    if cu_seq_q.shape != cu_seq_k.shape:
        raise ValueError(
            f"cu_seq_k: expected {cu_seq_q.shape[0]} entries as cu_seq_q, got {cu_seq_k.shape[0]}"
        )
    problem = backends.attention_problem(
        "varlen_attn", query, key, value, alibi_slopes=alibi_slopes
    )
    chosen = backends.select(problem, backend)
    if not query.is_cuda:
        starts_q = _checked_starts("cu_seq_q", cu_seq_q, query.shape[0], "max_q", max_q)
        starts_k = _checked_starts("cu_seq_k", cu_seq_k, key.shape[0], "max_k", max_k)
    if chosen != "reference":
        per_head = [x.transpose(0, 1) for x in (query, key, value)]  # [heads, tokens, dim]
        _validate.attention(*per_head, enable_gqa=True)
        if window_size is not None or softcap or alibi_slopes is not None:
            sequences = per_head[0].expand(cu_seq_q.shape[0] - 1, *per_head[0].shape)
            _validate.extras(window_size, softcap, alibi_slopes, sequences)
        if scale is None:
            scale = 1.0 / math.sqrt(query.shape[-1])
        _validate.number("scale", scale)
        seed = None
        if dropout_p > 0.0:
            seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
        out, lse = apply(
            AttentionFunction,
            *(x[None] for x in per_head),
            None,
            seed,
            is_causal,
            float(scale),
            float(dropout_p),
            alibi_slopes,
            cu_seq_q,
            cu_seq_k,
            kernel_options(window_size, softcap, max_q, max_k),
            chosen,
        )
        out, lse = out[0].transpose(0, 1), lse[0]
        return (out, lse) if return_lse else out
    if query.is_cuda:
        starts_q, starts_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    outs, lses = [], []
    for b in range(len(starts_q) - 1):
        rows_q, rows_k = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        slopes = (
            alibi_slopes[b]
            if alibi_slopes is not None and alibi_slopes.dim() == 2
            else alibi_slopes
        )
        out, lse = scaled_dot_product_attention(
            query[rows_q].transpose(0, 1),
            key[rows_k].transpose(0, 1),
            value[rows_k].transpose(0, 1),
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=True,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=slopes,
            return_lse=True,
            backend=chosen,
        )
        outs.append(out.transpose(0, 1))
        lses.append(lse)
    if not outs:
        out = query.new_empty((0, query.shape[1], value.shape[-1]))
        lse = query.new_empty((query.shape[1], 0), dtype=torch.float32)
    else:
        out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return (out, lse) if return_lse else out


def _checked_starts(
    argument: str, starts: Tensor, tokens: int, max_argument: str, longest: int
) -> list[int]:
    values = starts.tolist()
    if values[0] != 0 or values[-1] != tokens or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(
            f"{argument}: expected non-decreasing starts from 0 to {tokens}, got {values}"
        )
    lengths = [b - a for a, b in itertools.pairwise(values)]
    if lengths and max(lengths) > longest:
        raise ValueError(f"{max_argument}: expected at least {max(lengths)}, got {longest}")
    return values
