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
    make_rows,
    mask_gradient,
    mask_lists,
)
from fastattn.ops.triton.launch import cdiv, launch
from fastattn.ops.triton.problem import (
    four_dims,
    like_rows,
    make_problem,
    mask_strides,
    row_strides,
)


def attention_forward(*args: object) -> tuple[Tensor, ...]:
    """out ``[*, Hq, Sq, Dv]``, LSE ``[*, Hq, Sq]`` and its parts, row_max and log_sum."""
    inputs, extras, options = split(args, Inputs, Extras, Options)
    p = make_problem(inputs, extras, options)
    query, value = inputs.query, inputs.value
    out = like_rows(p.q, value.shape[-1], p.starts_q is not None)
    rows = [torch.empty(p.q.shape[:3], dtype=p.dtype, device=query.device) for _ in range(3)]
    tile = p.tile("forward", p.k, p.v)
    k, v = p.walked(tile, tile.block_k, p.k, p.v)
    lists, counts, list_strides = mask_lists(p, tile, by_key=False)
    launch(
        attention_forward_kernel,
        (cdiv(p.seq_q, tile.block_q) * p.batch * p.heads_q,),
        p.q,
        k,
        v,
        out,
        *rows,
        p.mask,
        lists,
        counts,
        *p.shared(),
        row_strides(p.q),
        row_strides(p.k),
        row_strides(p.v),
        row_strides(out),
        rows[0].stride()[:2],
        mask_strides(p.mask),
        list_strides,
        p.heads_q,
        p.batch * p.heads_q,
        p.group,
        p.section(p.seq_k, p.heads_k) * p.group,
        *p.tokens(),
        **p.common("forward", tile),
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
    strides = (*map(row_strides, (p.q, p.k, p.v, do)), rows.stride()[:2])
    if needs[0]:
        dq = like_rows(p.q, query.shape[-1], varlen)
        tile = p.tile("queries", p.k, p.v)
        k, v = p.walked(tile, tile.block_k, p.k, p.v)
        lists, counts, list_strides = mask_lists(p, tile, by_key=False)
        launch(
            attention_backward_queries_kernel,
            (cdiv(p.seq_q, tile.block_q) * p.batch * p.heads_q,),
            p.q,
            k,
            v,
            do,
            rows,
            dq,
            p.mask,
            lists,
            counts,
            *p.shared(),
            *strides,
            row_strides(dq),
            mask_strides(p.mask),
            list_strides,
            p.heads_q,
            p.batch * p.heads_q,
            p.group,
            p.section(p.seq_k, p.heads_k) * p.group,
            *p.tokens(),
            **p.common("queries", tile),
        )
        grads[0] = dq.view(query.shape)
    if needs[1] or needs[2]:
        dk = like_rows(p.k, query.shape[-1], varlen)
        dv = like_rows(p.v, value.shape[-1], varlen)
        tile = p.tile("keys", p.q, do)
        q, d_out = p.walked(tile, tile.block_q, p.q, do)
        lists, counts, list_strides = mask_lists(p, tile, by_key=True)
        launch(
            attention_backward_keys_kernel,
            (cdiv(p.seq_k, tile.block_k) * p.batch * p.heads_k,),
            q,
            p.k,
            p.v,
            d_out,
            rows,
            dk,
            dv,
            p.mask,
            lists,
            counts,
            *p.shared(),
            *strides,
            row_strides(dk),
            row_strides(dv),
            mask_strides(p.mask),
            list_strides,
            p.heads_k,
            p.batch * p.heads_k,
            p.group,
            p.section(p.seq_q * p.group, p.heads_k),
            *p.tokens(),
            **p.common("keys", tile),
        )
        grads[1] = dk.view(key.shape) if needs[1] else grads[1]
        grads[2] = dv.view(value.shape) if needs[2] else grads[2]
    if needs[3]:
        grads[3] = mask_gradient(p, do, rows, attn_mask, query.shape[:-3])
    return tuple(grads)
