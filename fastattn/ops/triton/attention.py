"""Attention by the Triton kernels: from tensors to launches.

The functions take what the ops of ``fastattn.ops.schemas`` take. Leading batch dimensions become
one; ``starts_q`` and ``starts_k`` mark packed sequences, whose tensors are ``[1, H, tokens, D]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn._call import Cotangents, Extras, Inputs, Options, Results, split
from fastattn.ops.triton.attention_backward_keys import attention_backward_keys_kernel
from fastattn.ops.triton.attention_backward_queries import attention_backward_queries_kernel
from fastattn.ops.triton.attention_forward import attention_forward_kernel
from fastattn.ops.triton.attention_parts import (
    check_cotangents,
    check_results,
    launch_walk,
    make_rows,
    mask_gradient,
)
from fastattn.ops.triton.problem import four_dims, like_rows, make_problem


def attention_forward(*args: object) -> tuple[Tensor, ...]:
    """out ``[*, Hq, Sq, Dv]``, LSE ``[*, Hq, Sq]`` and its parts, row_max and log_sum."""
    inputs, extras, options = split(args, Inputs, Extras, Options)
    p = make_problem(inputs, extras, options)
    query, value = inputs.query, inputs.value
    out = like_rows(p.q, value.shape[-1], p.starts_q is not None)
    rows = [torch.empty(p.q.shape[:3], dtype=p.dtype, device=query.device) for _ in range(3)]
    launch_walk(
        p,
        attention_forward_kernel,
        "forward",
        {"q": p.q, "k": p.k, "v": p.v, "o": out},
        dict(zip(("lse", "max", "log_sum"), rows, strict=True)),
        walked=("k", "v"),
    )
    out = out.view(*query.shape[:-1], value.shape[-1])
    return out, *(x.view(query.shape[:-1]) for x in rows)


def attention_backward(*args: object) -> tuple[Tensor, ...]:
    """The gradients of query, key, value and the float mask; one that is not needed is empty."""
    cotangents, inputs, extras, results, options, needs = split(
        args, Cotangents, Inputs, Extras, Results, Options
    )
    query, key, value, attn_mask = inputs
    p = make_problem(inputs, extras, options)
    check_results(p, inputs, results)
    check_cotangents(cotangents, attn_mask, results, needs[3])

    varlen = p.starts_q is not None
    do = four_dims(cotangents.out)
    softmax = [x.reshape(p.q.shape[:3]).contiguous() for x in (results.row_max, results.log_sum)]
    p.widen(do)
    rows = make_rows(p, do, four_dims(results.out), softmax, cotangents.lse)
    grads = [query.new_empty((0,)) for _ in range(4)]  # none may be another
    operands = {"q": p.q, "k": p.k, "v": p.v, "do": do}
    if needs[0]:
        dq = like_rows(p.q, query.shape[-1], varlen)
        launch_walk(
            p,
            attention_backward_queries_kernel,
            "queries",
            {**operands, "dq": dq},
            {"rows": rows},
            walked=("k", "v"),
        )
        grads[0] = dq.view(query.shape)
    if needs[1] or needs[2]:
        dk = like_rows(p.k, query.shape[-1], varlen)
        dv = like_rows(p.v, value.shape[-1], varlen)
        launch_walk(
            p,
            attention_backward_keys_kernel,
            "keys",
            {**operands, "dk": dk, "dv": dv},
            {"rows": rows},
            walked=("q", "do"),
            by_key=True,
        )
        grads[1] = dk.view(key.shape) if needs[1] else grads[1]
        grads[2] = dv.view(value.shape) if needs[2] else grads[2]
    if needs[3]:
        grads[3] = mask_gradient(p, do, rows, attn_mask, query.shape[:-3])
    return tuple(grads)
