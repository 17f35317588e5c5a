"""Forward mode and double backward by the Triton kernels: from tensors to launches.

Arguments are those of ``fastattn.ops.triton.attention``; ``t_*`` are tangents of what they are
named after, absent ones are 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.ops.triton.attention_jvp import attention_jvp_kernel
from fastattn.ops.triton.attention_parts import (
    Tangents,
    check_cotangents,
    check_results,
    make_second_rows,
    mask_gradient,
    mask_lists,
)
from fastattn.ops.triton.attention_second_keys import attention_second_keys_kernel
from fastattn.ops.triton.attention_second_queries import attention_second_queries_kernel
from fastattn.ops.triton.launch import cdiv, launch
from fastattn.ops.triton.problem import (
    FLAG,
    Problem,
    four_dims,
    like_rows,
    make_problem,
    mask_4d,
    mask_strides,
    require,
    row_strides,
)


def _make_tangents(
    p: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    t_query: Tensor | None,
    t_key: Tensor | None,
    t_value: Tensor | None,
    t_mask: Tensor | None,
) -> Tangents:
    pairs = {
        "t_query": (t_query, query),
        "t_key": (t_key, key),
        "t_value": (t_value, value),
        "t_mask": (t_mask, attn_mask),
    }
    good = t_mask is None or (attn_mask is not None and attn_mask.dtype != torch.bool)
    require(good, "t_mask", "none without a float mask", t_mask)
    for name, (tangent, x) in pairs.items():
        if tangent is None:
            continue
        good = tangent.shape == x.shape and tangent.dtype == x.dtype and tangent.device == x.device
        require(good, name, f"{x.dtype} {tuple(x.shape)} on {x.device}",
                 (tangent.dtype, tuple(tangent.shape), tangent.device))  # fmt: skip
        if name != "t_mask" or p.mask is not None:
            p.flags |= FLAG[name.upper()]
    t = Tangents(
        None if t_query is None else four_dims(t_query),
        None if t_key is None else four_dims(t_key),
        None if t_value is None else four_dims(t_value),
        None if t_mask is None or p.mask is None else mask_4d(t_mask, query.shape[:-3]),
    )
    p.widen(*t)
    return t


def _jvp(
    p: Problem, t: Tangents, out: Tensor, row_max: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """tO ``[B, Hq, Sq, Dv]`` and μ ``[B, Hq, Sq]``, E12."""
    t_out = like_rows(p.q, p.v.shape[-1], p.starts_q is not None)
    mu = torch.empty_like(row_max)
    tile = p.tile("jvp", p.k, p.v, t.k, t.v)
    k, v, t_k, t_v = p.walked(tile, tile.block_k, p.k, p.v, t.k, t.v)
    lists, counts, list_strides = mask_lists(p, tile, by_key=False)
    launch(
        attention_jvp_kernel,
        (cdiv(p.seq_q, tile.block_q) * p.batch * p.heads_q,),
        p.q,
        k,
        v,
        t.q,
        t_k,
        t_v,
        out,
        row_max,
        log_sum,
        t_out,
        mu,
        p.mask,
        t.mask,
        lists,
        counts,
        *p.shared(),
        *map(row_strides, (p.q, p.k, p.v, t.q, t.k, t.v, out)),
        row_max.stride()[:2],
        row_strides(t_out),
        mu.stride()[:2],
        mask_strides(p.mask),
        mask_strides(t.mask),
        list_strides,
        p.heads_q,
        p.batch * p.heads_q,
        p.group,
        p.section(p.seq_k, p.heads_k) * p.group,
        *p.tokens(),
        **p.common("jvp", tile),
    )
    return t_out, mu


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    slopes: Tensor | None,
    t_query: Tensor | None,
    t_key: Tensor | None,
    t_value: Tensor | None,
    t_mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    seed: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The tangents of out ``[*, Hq, Sq, Dv]`` and of LSE ``[*, Hq, Sq]``."""
    p = make_problem(
        query, key, value, attn_mask, slopes, seed, starts_q, starts_k, max_q, max_k, is_causal,
        scale, dropout_p, left, right, softcap,
    )  # fmt: skip
    check_results(p, query, value, out, row_max, log_sum)
    t = _make_tangents(p, query, key, value, attn_mask, t_query, t_key, t_value, t_mask)
    o = four_dims(out)
    p.widen(o)
    softmax = [x.reshape(p.q.shape[:3]).contiguous() for x in (row_max, log_sum)]
    t_out, mu = _jvp(p, t, o, *softmax)
    return t_out.view(out.shape), mu.view(row_max.shape)


def _gradient_of_queries(p: Problem, t: Tangents, do: Tensor, rows: Tensor) -> Tensor:
    gq = like_rows(p.q, p.q.shape[-1], p.starts_q is not None)
    tile = p.tile("second_queries", p.k, p.v, t.k, t.v)
    k, v, t_k, t_v = p.walked(tile, tile.block_k, p.k, p.v, t.k, t.v)
    lists, counts, list_strides = mask_lists(p, tile, by_key=False)
    launch(
        attention_second_queries_kernel,
        (cdiv(p.seq_q, tile.block_q) * p.batch * p.heads_q,),
        p.q,
        k,
        v,
        t.q,
        t_k,
        t_v,
        do,
        rows,
        gq,
        p.mask,
        t.mask,
        lists,
        counts,
        *p.shared(),
        *map(row_strides, (p.q, p.k, p.v, t.q, t.k, t.v, do)),
        rows.stride()[:2],
        row_strides(gq),
        mask_strides(p.mask),
        mask_strides(t.mask),
        list_strides,
        p.heads_q,
        p.batch * p.heads_q,
        p.group,
        p.section(p.seq_k, p.heads_k) * p.group,
        *p.tokens(),
        **p.common("second_queries", tile),
    )
    return gq


def _gradients_of_keys(p: Problem, t: Tangents, do: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    packed = p.starts_q is not None
    gk, gv = (like_rows(x, x.shape[-1], packed) for x in (p.k, p.v))
    tile = p.tile("second_keys", p.q, t.q, do)
    q, t_q, d_out = p.walked(tile, tile.block_q, p.q, t.q, do)
    lists, counts, list_strides = mask_lists(p, tile, by_key=True)
    launch(
        attention_second_keys_kernel,
        (cdiv(p.seq_k, tile.block_k) * p.batch * p.heads_k,),
        q,
        p.k,
        p.v,
        t_q,
        t.k,
        t.v,
        d_out,
        rows,
        gk,
        gv,
        p.mask,
        t.mask,
        lists,
        counts,
        *p.shared(),
        *map(row_strides, (p.q, p.k, p.v, t.q, t.k, t.v, do)),
        rows.stride()[:2],
        row_strides(gk),
        row_strides(gv),
        mask_strides(p.mask),
        mask_strides(t.mask),
        list_strides,
        p.heads_k,
        p.batch * p.heads_k,
        p.group,
        p.section(p.seq_q * p.group, p.heads_k),
        *p.tokens(),
        **p.common("second_keys", tile),
    )
    return gk, gv


def attention_double_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    slopes: Tensor | None,
    t_query: Tensor | None,
    t_key: Tensor | None,
    t_value: Tensor | None,
    t_mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    seed: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    left: int,
    right: int,
    softcap: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``attention_jvp``'s tangents, which are the gradients of grad_out and grad_lse, and those of
    query, key, value and the float mask, E14; ``needs`` has one flag for both tangents, then one
    each. What is not needed is empty."""
    p = make_problem(
        query, key, value, attn_mask, slopes, seed, starts_q, starts_k, max_q, max_k, is_causal,
        scale, dropout_p, left, right, softcap,
    )  # fmt: skip
    check_results(p, query, value, out, row_max, log_sum)
    check_cotangents(grad_out, grad_lse, attn_mask, out, row_max, needs[4])
    t = _make_tangents(p, query, key, value, attn_mask, t_query, t_key, t_value, t_mask)
    do, o = four_dims(grad_out), four_dims(out)
    softmax = [x.reshape(p.q.shape[:3]).contiguous() for x in (row_max, log_sum)]
    p.widen(do, o)
    like = (query, row_max, query, key, value, query)
    results = [x.new_empty((0,)) for x in like]  # none may be another
    if not any(needs):
        return tuple(results)
    t_out, mu = _jvp(p, t, o, *softmax)
    if needs[0]:
        results[:2] = t_out.view(out.shape), mu.view(row_max.shape)
    if not any(needs[1:]):
        return tuple(results)
    # β, as Δ: the row's weighted sum of what E14 subtracts it from
    rows = make_second_rows(p, do, o, t_out, softmax, mu, grad_lse)
    if needs[1]:
        results[2] = _gradient_of_queries(p, t, do, rows).view(query.shape)
    if needs[2] or needs[3]:
        gk, gv = _gradients_of_keys(p, t, do, rows)
        results[3] = gk.view(key.shape) if needs[2] else results[3]
        results[4] = gv.view(value.shape) if needs[3] else results[4]
    if needs[4]:
        results[5] = mask_gradient(p, do, rows, attn_mask, query.shape[:-3], t)
    return tuple(results)
