"""What the ways through attention share on the host: checks, Δ, the mask's lists and gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.triton import config
from fastattn.ops.triton.attention_backward import attention_delta_kernel
from fastattn.ops.triton.attention_mask import (
    attention_mask_gradient_kernel,
    mask_list_kernel,
    mask_map_kernel,
)
from fastattn.ops.triton.launch import cdiv, launch, next_power_of_2
from fastattn.ops.triton.problem import FLAG, Problem, is_wide, mask_strides, require, row_strides

_DELTA_ROWS = 64
_MAP_TILE = 1024  # entries of the mask's map that one step turns into lists
_MAP_FLAGS = FLAG["MASKED"] | FLAG["WINDOWED"] | FLAG["WIDE"]


def check_results(p: Problem, query: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> None:
    """out and lse are the forward's."""
    good = out.shape == (*query.shape[:-1], value.shape[-1])
    require(good, "out", "the forward's output", tuple(out.shape))
    good = lse.shape == query.shape[:-1] and lse.dtype == p.dtype
    require(good, "lse", f"{p.dtype} {tuple(query.shape[:-1])}", (lse.dtype, tuple(lse.shape)))


def check_cotangents(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs_mask: bool,
) -> None:
    """What a gradient comes from is shaped like out and lse; only a float mask has one."""
    require(grad_out.shape == out.shape, "grad_out", f"{tuple(out.shape)}", tuple(grad_out.shape))
    if grad_lse is not None:
        good = grad_lse.shape == lse.shape
        require(good, "grad_lse", f"{tuple(lse.shape)}", tuple(grad_lse.shape))
    good = not needs_mask or (attn_mask is not None and attn_mask.dtype != torch.bool)
    require(good, "attn_mask", "a float mask where its gradient is needed", attn_mask)


def make_delta(p: Problem, do: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """E6's Δ, ``[B, Hq, Sq]``: packed sequences are one batch element of all tokens here."""
    delta = torch.empty_like(lse)
    batch, heads, rows, dim = out.shape
    flags = FLAG["WIDE"] if is_wide(out, do) else 0
    strides = None
    if grad_lse is not None:
        flags |= FLAG["LSE_GRADIENT"]
        grad_lse = grad_lse.reshape(lse.shape)
        strides = grad_lse.stride()
    launch(
        attention_delta_kernel,
        (cdiv(rows, _DELTA_ROWS) * batch * heads,),
        out,
        do,
        lse,
        grad_lse,
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


class Tangents(NamedTuple):
    """The tangents in 4 dimensions; the problem's FLAGS say which there are."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    mask: Tensor | None = None


def mask_gradient(
    p: Problem,
    do: Tensor,
    rows: tuple[Tensor, ...],
    attn_mask: Tensor,
    batch: torch.Size,
    tangents: Tangents | None = None,
) -> Tensor:
    """E11 from the rows' LSE and Δ; beside tangents E14 from LSE, Δ, μ and β. What is small is kept
    for every batch element and head, and added up by torch: more programs, and the same order of
    additions."""
    if p.mask is None:
        return torch.zeros_like(attn_mask)
    kernel = "mask_gradient" if tangents is None else "second_mask"
    tile = p.tile(kernel)
    t = tangents or Tangents()
    options = p.common(kernel, tile)
    if tangents is not None:
        options["FLAGS"] |= FLAG["SECOND_ORDER"]
    blocks = cdiv(p.seq_q, tile.block_q), cdiv(p.seq_k, tile.block_k)
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
        *t[:3],
        *rows,
        *[None] * (4 - len(rows)),
        dm,
        p.mask,
        t.mask,
        *p.shared()[:2],
        *map(row_strides, (p.q, p.k, p.v, do, *t[:3])),
        rows[0].stride()[:2],
        dm.stride(),
        mask_strides(p.mask),
        mask_strides(t.mask),
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
        raw_scale=p.scale,
        **options,
    )
    dm = dm.sum_to_size(p.mask.shape)
    if p.mask.shape[0] > 1:
        dm = dm.view(*batch, *p.mask.shape[1:]).sum_to_size(attn_mask.shape)
    return dm.view(attn_mask.shape).to(attn_mask.dtype)


def mask_lists(
    p: Problem, tile: config.Tile, by_key: bool
) -> tuple[Tensor | None, Tensor | None, tuple | None]:
    """The blocks that the mask leaves to each block of queries (of keys, by_key): lists,
    counts, and the strides of batch, head and block in counts, in pairs."""
    if p.mask is None:
        return None, None, None
    batch, heads = p.mask.shape[:2]
    rows, columns = cdiv(p.seq_q, tile.block_q), cdiv(p.seq_k, tile.block_k)
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
        mask_strides(p.mask),
        strides,
        p.seq_q,
        p.seq_k,
        *p.window(),
        heads,
        rows,
        columns,
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
        FLAGS=p.flags & _MAP_FLAGS,
        device=device,
    )
    outer, inner = math.prod(shape[:3]), shape[3]
    lists = torch.empty((outer, 2, inner), dtype=torch.int32, device=device)
    counts = torch.empty((outer, 2), dtype=torch.int32, device=device)
    block = min(_MAP_TILE, next_power_of_2(inner))
    launch(mask_list_kernel, (outer,), tiles, lists, counts, inner, BLOCK=block, device=device)
    return lists, counts, (
        heads * shape[2] if batch > 1 else 0,
        shape[2] if heads > 1 else 0,
        0 if alike else 1,
    )  # fmt: skip
