"""Forward mode and double backward by the Triton kernels: from tensors to launches.

The functions take what the ops of ``fastattn.ops.schemas`` take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn._call import Cotangents, Extras, Inputs, Options, Results, Tangents, split
from fastattn.ops.triton.attention_jvp import attention_jvp_kernel
from fastattn.ops.triton.attention_parts import (
    Tangents4,
    check_cotangents,
    check_results,
    launch_walk,
    make_second_rows,
    mask_gradient,
)
from fastattn.ops.triton.attention_second_keys import attention_second_keys_kernel
from fastattn.ops.triton.attention_second_queries import attention_second_queries_kernel
from fastattn.ops.triton.problem import (
    FLAG,
    Problem,
    four_dims,
    like_rows,
    make_problem,
    mask_4d,
    require,
)


def _make_tangents(p: Problem, inputs: Inputs, tangents: Tangents) -> Tangents4:
    mask = inputs.attn_mask
    t_query, t_key, t_value, t_mask = tangents
    good = t_mask is None or (mask is not None and mask.dtype != torch.bool)
    require(good, "t_mask", "none without a float mask", t_mask)
    names = ("t_query", "t_key", "t_value", "t_mask")
    for name, tangent, x in zip(names, tangents, inputs, strict=True):
        if tangent is None or x is None:
            continue
        good = tangent.shape == x.shape and tangent.dtype == x.dtype and tangent.device == x.device
        require(good, name, f"{x.dtype} {tuple(x.shape)} on {x.device}",
                 (tangent.dtype, tuple(tangent.shape), tangent.device))  # fmt: skip
        if name != "t_mask" or p.mask is not None:
            p.flags |= FLAG[name.upper()]
    t = Tangents4(
        None if t_query is None else four_dims(t_query),
        None if t_key is None else four_dims(t_key),
        None if t_value is None else four_dims(t_value),
        None if t_mask is None or p.mask is None else mask_4d(t_mask, inputs.query.shape[:-3]),
    )
    p.widen(*t)
    return t


def _operands(p: Problem, t: Tangents4) -> dict[str, Tensor | None]:
    return {"q": p.q, "k": p.k, "v": p.v, "t_q": t.q, "t_k": t.k, "t_v": t.v}


def _jvp(
    p: Problem, t: Tangents4, out: Tensor, row_max: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """tO ``[B, Hq, Sq, Dv]`` and μ ``[B, Hq, Sq]``, E12."""
    t_out = like_rows(p.q, p.v.shape[-1], p.starts_q is not None)
    mu = torch.empty_like(row_max)
    launch_walk(
        p,
        attention_jvp_kernel,
        "jvp",
        {**_operands(p, t), "o": out, "t_o": t_out},
        {"max": row_max, "log_sum": log_sum, "mu": mu},
        walked=("k", "v", "t_k", "t_v"),
        t_mask=t.mask,
    )
    return t_out, mu


def attention_jvp(*args: object) -> tuple[Tensor, Tensor]:
    """The tangents of out ``[*, Hq, Sq, Dv]`` and of LSE ``[*, Hq, Sq]``."""
    inputs, extras, tangents, results, options = split(
        args, Inputs, Extras, Tangents, Results, Options
    )
    p = make_problem(inputs, extras, options)
    check_results(p, inputs, results)
    t = _make_tangents(p, inputs, tangents)
    out, *softmax = results
    o = four_dims(out)
    p.widen(o)
    softmax = [x.reshape(p.q.shape[:3]).contiguous() for x in softmax]
    t_out, mu = _jvp(p, t, o, *softmax)
    return t_out.view(out.shape), mu.view(results.row_max.shape)


def _gradient_of_queries(p: Problem, t: Tangents4, do: Tensor, rows: Tensor) -> Tensor:
    gq = like_rows(p.q, p.q.shape[-1], p.starts_q is not None)
    launch_walk(
        p,
        attention_second_queries_kernel,
        "second_queries",
        {**_operands(p, t), "do": do, "dq": gq},
        {"rows": rows},
        walked=("k", "v", "t_k", "t_v"),
        t_mask=t.mask,
    )
    return gq


def _gradients_of_keys(p: Problem, t: Tangents4, do: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    packed = p.starts_q is not None
    gk, gv = (like_rows(x, x.shape[-1], packed) for x in (p.k, p.v))
    launch_walk(
        p,
        attention_second_keys_kernel,
        "second_keys",
        {**_operands(p, t), "do": do, "dk": gk, "dv": gv},
        {"rows": rows},
        walked=("q", "t_q", "do"),
        t_mask=t.mask,
        by_key=True,
    )
    return gk, gv


def attention_double_backward(
    *args: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``attention_jvp``'s tangents, which are the gradients of grad_out and grad_lse, and those of
    query, key, value and the float mask, E14; ``needs`` has one flag for both tangents, then one
    each. What is not needed is empty."""
    cotangents, inputs, extras, tangents, results, options, needs = split(
        args, Cotangents, Inputs, Extras, Tangents, Results, Options
    )
    query, key, value, attn_mask = inputs
    out, *softmax = results
    p = make_problem(inputs, extras, options)
    check_results(p, inputs, results)
    check_cotangents(cotangents, attn_mask, results, needs[4])
    t = _make_tangents(p, inputs, tangents)
    do, o = four_dims(cotangents.out), four_dims(out)
    softmax = [x.reshape(p.q.shape[:3]).contiguous() for x in softmax]
    p.widen(do, o)
    like = (query, results.row_max, query, key, value, query)
    found = [x.new_empty((0,)) for x in like]  # none may be another
    if not any(needs):
        return tuple(found)
    t_out, mu = _jvp(p, t, o, *softmax)
    if needs[0]:
        found[:2] = t_out.view(out.shape), mu.view(results.row_max.shape)
    if not any(needs[1:]):
        return tuple(found)
    # β, as Δ: the row's weighted sum of what E14 subtracts it from
    rows = make_second_rows(p, do, o, t_out, softmax, mu, cotangents.lse)
    if needs[1]:
        found[2] = _gradient_of_queries(p, t, do, rows).view(query.shape)
    if needs[2] or needs[3]:
        gk, gv = _gradients_of_keys(p, t, do, rows)
        found[3] = gk.view(key.shape) if needs[2] else found[3]
        found[4] = gv.view(value.shape) if needs[3] else found[4]
    if needs[4]:
        found[5] = mask_gradient(p, do, rows, attn_mask, query.shape[:-3], t)
    return tuple(found)
