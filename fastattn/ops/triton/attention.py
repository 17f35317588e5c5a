"""Attention by the Triton kernels: from tensors to launches.

The functions take what ``fastattn.ops.attention`` takes. Leading batch dimensions become one;
``starts_q`` and ``starts_k`` mark packed sequences, whose tensors are ``[1, H, tokens, D]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from fastattn.ops.triton import config
from fastattn.ops.triton.attention_backward import attention_delta_kernel
from fastattn.ops.triton.attention_backward_keys import attention_backward_keys_kernel
from fastattn.ops.triton.attention_backward_queries import attention_backward_queries_kernel
from fastattn.ops.triton.attention_forward import attention_forward_kernel
from fastattn.ops.triton.attention_mask import (
    attention_mask_gradient_kernel,
    mask_list_kernel,
    mask_map_kernel,
)
from fastattn.ops.triton.launch import launch
from fastattn.ops.triton.problem import (
    FLAG,
    Problem,
    four_dims,
    like_rows,
    make_problem,
    require,
    row_strides,
)

_DELTA_ROWS = 64
_MAP_TILE = 1024  # entries of the mask's map that one step turns into lists


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    slopes: Tensor | None,
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
    """out ``[*, Hq, Sq, Dv]`` and LSE ``[*, Hq, Sq]``."""
    p = make_problem(
        query, key, value, attn_mask, slopes, seed, starts_q, starts_k, max_q, max_k, is_causal,
        scale, dropout_p, left, right, softcap,
    )  # fmt: skip
    out = like_rows(p.q, value.shape[-1], starts_q is not None)
    lse = torch.empty(p.q.shape[:3], dtype=p.dtype, device=query.device)
    tile = p.tile("forward", p.k, p.v)
    k, v = p.walked(tile, tile.block_k, p.k, p.v)
    lists, counts, list_strides = _mask_lists(p, tile, by_key=False)
    launch(
        attention_forward_kernel,
        (triton.cdiv(p.seq_q, tile.block_q) * p.batch * p.heads_q,),
        p.q,
        k,
        v,
        out,
        lse,
        p.pointer(p.mask),
        p.pointer(lists),
        p.pointer(counts),
        p.pointer(p.slopes),
        p.pointer(p.seed),
        p.pointer(starts_q),
        p.pointer(starts_k),
        row_strides(p.q),
        row_strides(p.k),
        row_strides(p.v),
        row_strides(out),
        lse.stride()[:2],
        p.mask_strides(),
        list_strides,
        p.heads_q,
        p.batch * p.heads_q,
        p.group,
        p.section(p.seq_k, p.heads_k) * p.group,
        p.q.shape[2],
        p.k.shape[2],
        **p.common(tile),
    )
    return out.view(*query.shape[:-1], value.shape[-1]), lse.view(query.shape[:-1])


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    slopes: Tensor | None,
    out: Tensor,
    lse: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and the float mask; one that is not needed is empty."""
    p = make_problem(
        query, key, value, attn_mask, slopes, seed, starts_q, starts_k, max_q, max_k, is_causal,
        scale, dropout_p, left, right, softcap,
    )  # fmt: skip
    require(out.shape == (*query.shape[:-1], value.shape[-1]), "out", "the forward's output",
             tuple(out.shape))  # fmt: skip
    require(grad_out.shape == out.shape, "grad_out", f"{tuple(out.shape)}", tuple(grad_out.shape))
    good = lse.shape == query.shape[:-1] and lse.dtype == p.dtype
    require(good, "lse", f"{p.dtype} {tuple(query.shape[:-1])}", (lse.dtype, tuple(lse.shape)))
    if grad_lse is not None:
        good = grad_lse.shape == lse.shape
        require(good, "grad_lse", f"{tuple(lse.shape)}", tuple(grad_lse.shape))
    good = not needs[3] or (attn_mask is not None and attn_mask.dtype != torch.bool)
    require(good, "attn_mask", "a float mask where its gradient is needed", attn_mask)

    varlen = starts_q is not None
    do, lse = four_dims(grad_out), lse.reshape(p.q.shape[:3])
    delta = _delta(p, do, four_dims(out), lse, grad_lse)
    absent = query.new_empty((0,))
    grads = [absent] * 4
    shared = (p.pointer(p.slopes), p.pointer(p.seed), p.pointer(starts_q), p.pointer(starts_k))
    strides = (*map(row_strides, (p.q, p.k, p.v, do)), lse.stride()[:2], delta.stride()[:2])
    if needs[0]:
        dq = like_rows(p.q, query.shape[-1], varlen)
        tile = p.tile("queries", p.k, p.v)
        k, v = p.walked(tile, tile.block_k, p.k, p.v)
        lists, counts, list_strides = _mask_lists(p, tile, by_key=False)
        launch(
            attention_backward_queries_kernel,
            (triton.cdiv(p.seq_q, tile.block_q) * p.batch * p.heads_q,),
            p.q,
            k,
            v,
            do,
            lse,
            delta,
            dq,
            p.pointer(p.mask),
            p.pointer(lists),
            p.pointer(counts),
            *shared,
            *strides,
            row_strides(dq),
            p.mask_strides(),
            list_strides,
            p.heads_q,
            p.batch * p.heads_q,
            p.group,
            p.section(p.seq_k, p.heads_k) * p.group,
            p.q.shape[2],
            p.k.shape[2],
            out_scale=p.scale,
            **p.common(tile),
        )
        grads[0] = dq.view(query.shape)
    if needs[1] or needs[2]:
        dk = like_rows(p.k, query.shape[-1], varlen)
        dv = like_rows(p.v, value.shape[-1], varlen)
        tile = p.tile("keys", p.q, do)
        q, d_out = p.walked(tile, tile.block_q, p.q, do)
        lists, counts, list_strides = _mask_lists(p, tile, by_key=True)
        launch(
            attention_backward_keys_kernel,
            (triton.cdiv(p.seq_k, tile.block_k) * p.batch * p.heads_k,),
            q,
            p.k,
            p.v,
            d_out,
            lse,
            delta,
            dk,
            dv,
            p.pointer(p.mask),
            p.pointer(lists),
            p.pointer(counts),
            *shared,
            *strides,
            row_strides(dk),
            row_strides(dv),
            p.mask_strides(),
            list_strides,
            p.heads_k,
            p.batch * p.heads_k,
            p.group,
            p.section(p.seq_q * p.group, p.heads_k),
            p.q.shape[2],
            p.k.shape[2],
            out_scale=p.scale,
            **p.common(tile),
        )
        grads[1] = dk.view(key.shape) if needs[1] else absent
        grads[2] = dv.view(value.shape) if needs[2] else absent
    if needs[3]:
        grads[3] = _mask_gradient(p, do, lse, delta, attn_mask, query.shape[:-3])
    return tuple(grads)


def _delta(p: Problem, do: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """E6's Δ, ``[B, Hq, Sq]``: packed sequences are one batch element of all tokens here."""
    delta = torch.empty_like(lse)
    batch, heads, rows, dim = out.shape
    flags = p.flags & FLAG["WIDE"]
    strides = (0, 0, 0)
    if grad_lse is not None:
        flags |= FLAG["LSE_GRADIENT"]
        grad_lse = grad_lse.reshape(lse.shape)
        strides = grad_lse.stride()
    launch(
        attention_delta_kernel,
        (triton.cdiv(rows, _DELTA_ROWS) * batch * heads,),
        out,
        do,
        lse,
        p.pointer(grad_lse),
        delta,
        row_strides(out),
        row_strides(do),
        lse.stride()[:2],
        strides,
        delta.stride()[:2],
        heads,
        rows,
        HEAD_DIM_V=dim,
        BLOCK_DV=p.blocks_d[1],
        BLOCK_Q=_DELTA_ROWS,
        FLAGS=flags,
        device=out.device,
    )
    return delta


def _mask_gradient(
    p: Problem, do: Tensor, lse: Tensor, delta: Tensor, attn_mask: Tensor, batch: torch.Size
) -> Tensor:
    """E11. What is small is kept for every batch element and head, and added up by torch: more
    programs, and the same order of additions."""
    if p.mask is None:
        return torch.zeros_like(attn_mask)
    tile = p.tile("mask_gradient")
    blocks = triton.cdiv(p.seq_q, tile.block_q), triton.cdiv(p.seq_k, tile.block_k)
    shared_rows = p.mask.shape[2] == 1
    shared_columns = not shared_rows and p.mask.shape[3] == 1
    apart = shared_rows or shared_columns
    outer = (p.batch, p.heads_q) if apart else tuple(p.mask.shape[:2])
    dm = torch.empty(
        (*outer, 1 if shared_rows else p.seq_q, 1 if shared_columns else p.seq_k),
        dtype=p.dtype,
        device=p.q.device,
    )
    row_blocks, column_blocks = 1 if shared_rows else blocks[0], 1 if shared_columns else blocks[1]
    launch(
        attention_mask_gradient_kernel,
        (math.prod(outer) * row_blocks * column_blocks,),
        p.q,
        p.k,
        p.v,
        do,
        lse,
        delta,
        dm,
        p.mask,
        p.pointer(p.slopes),
        p.pointer(p.seed),
        *map(row_strides, (p.q, p.k, p.v, do)),
        lse.stride()[:2],
        delta.stride()[:2],
        dm.stride(),
        p.mask_strides(),
        p.heads_q,
        p.group,
        row_blocks=row_blocks,
        column_blocks=column_blocks,
        each_batch=p.batch // outer[0] if outer[0] else 1,
        each_head=p.heads_q // outer[1] if outer[1] else 1,
        each_row=blocks[0] // row_blocks,
        each_column=blocks[1] // column_blocks,
        SHARED_ROWS=shared_rows,
        SHARED_COLUMNS=shared_columns,
        **p.common(tile),
    )
    dm = dm.sum_to_size(p.mask.shape)
    if p.mask.shape[0] > 1:
        dm = dm.view(*batch, *p.mask.shape[1:]).sum_to_size(attn_mask.shape)
    return dm.view(attn_mask.shape).to(attn_mask.dtype)


def _mask_lists(
    p: Problem, tile: config.Tile, by_key: bool
) -> tuple[Tensor | None, Tensor | None, tuple]:
    """The blocks that the mask leaves to each block of queries (of keys, by_key): lists,
    counts, and the strides of batch, head and block in counts, in pairs."""
    if p.mask is None:
        return None, None, (0, 0, 0)
    batch, heads = p.mask.shape[:2]
    rows, columns = triton.cdiv(p.seq_q, tile.block_q), triton.cdiv(p.seq_k, tile.block_k)
    alike = not by_key and p.mask.shape[2] == 1 and p.left < 0 and p.right < 0
    rows = 1 if alike else rows
    shape = (batch, heads, columns, rows) if by_key else (batch, heads, rows, columns)
    device = p.q.device
    tiles = torch.empty(shape, dtype=torch.int8, device=device)
    strides = tiles.stride()
    if by_key:
        strides = (strides[0], strides[1], strides[3], strides[2])
    launch(
        mask_map_kernel,
        (tiles.numel(),),
        p.mask,
        tiles,
        p.mask_strides(),
        strides,
        p.seq_q,
        p.seq_k,
        p.left,
        p.right,
        heads,
        rows,
        columns,
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
        FLAGS=p.flags,
        device=device,
    )
    outer, inner = math.prod(shape[:3]), shape[3]
    lists = torch.empty((outer, 2, inner), dtype=torch.int32, device=device)
    counts = torch.empty((outer, 2), dtype=torch.int32, device=device)
    block = min(_MAP_TILE, triton.next_power_of_2(inner))
    launch(mask_list_kernel, (outer,), tiles, lists, counts, inner, BLOCK=block, device=device)
    return lists, counts, (
        heads * shape[2] if batch > 1 else 0,
        shape[2] if heads > 1 else 0,
        0 if alike else 1,
    )  # fmt: skip
