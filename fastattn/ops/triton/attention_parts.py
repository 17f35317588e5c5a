"""Helpers on the host that the launches of attention's kernels share: checks, Δ, the mask's lists
and gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn._call import Cotangents, Inputs, Results
from fastattn.ops.triton import config, flags
from fastattn.ops.triton.attention_backward import attention_delta_kernel
from fastattn.ops.triton.attention_mask import (
    attention_mask_gradient_kernel,
    mask_list_kernel,
    mask_map_kernel,
)
from fastattn.ops.triton.launch import cdiv, launch, next_power_of_2
from fastattn.ops.triton.problem import FLAG, Problem, is_wide, mask_strides, require, row_strides
from fastattn.ops.triton.tuples import Mask, Strides

_DELTA_ROWS = 32
_MAP_TILE = 1024  # entries of the mask's map that one step turns into lists
_MAP_FLAGS = FLAG["MASKED"] | FLAG["WINDOWED"] | FLAG["WIDE"]


def check_results(p: Problem, inputs: Inputs, results: Results) -> None:
    """They are the forward's."""
    rows, out = inputs.query.shape[:-1], results.out
    good = out.shape == (*rows, inputs.value.shape[-1])
    require(good, "out", "the forward's output", tuple(out.shape))
    for name, x in (("row_max", results.row_max), ("log_sum", results.log_sum)):
        good = x.shape == rows and x.dtype == p.dtype
        require(good, name, f"{p.dtype} {tuple(rows)}", (x.dtype, tuple(x.shape)))


def check_cotangents(
    cotangents: Cotangents, attn_mask: Tensor | None, results: Results, needs_mask: bool
) -> None:
    """What a gradient comes from is shaped like out and the LSE; only a float mask has one."""
    (grad_out, grad_lse), (out, row_max, _) = cotangents, results
    assert grad_out is not None  # the op's schema
    require(grad_out.shape == out.shape, "grad_out", f"{tuple(out.shape)}", tuple(grad_out.shape))
    if grad_lse is not None:
        good = grad_lse.shape == row_max.shape
        require(good, "grad_lse", f"{tuple(row_max.shape)}", tuple(grad_lse.shape))
    good = not needs_mask or (attn_mask is not None and attn_mask.dtype != torch.bool)
    require(good, "attn_mask", "a float mask where its gradient is needed", attn_mask)


def make_rows(
    p: Problem,
    do: Tensor,
    out: Tensor,
    softmax: Sequence[Tensor],
    grad_lse: Tensor | None,
    width: int = flags.ROW.value,
) -> Tensor:
    """What the backward's kernels know of each row, ``[B, Hq, Sq, width]``; packed sequences are
    one batch element of all tokens here."""
    rows = softmax[0].new_empty((*softmax[0].shape, width))
    _add_product(p, do, out, softmax, None, grad_lse, rows)
    return rows


def make_second_rows(
    p: Problem,
    do: Tensor,
    out: Tensor,
    t_out: Tensor,
    softmax: Sequence[Tensor],
    mu: Tensor,
    grad_lse: Tensor | None,
) -> Tensor:
    """The same of the second order: μ and β = rowsum(dO∘tO), E14, too."""
    rows = make_rows(p, do, out, softmax, grad_lse, flags.SECOND_ROW.value)
    _add_product(p, do, t_out, softmax, mu, None, rows)
    return rows


def _add_product(
    p: Problem,
    do: Tensor,
    out: Tensor,
    softmax: Sequence[Tensor],
    mu: Tensor | None,
    grad_lse: Tensor | None,
    rows: Tensor,
) -> None:
    batch, heads, seq_q, dim = out.shape
    bits = FLAG["WIDE"] if is_wide(out, do) else 0
    strides = None
    if grad_lse is not None:
        bits |= FLAG["LSE_GRADIENT"]
        grad_lse = grad_lse.reshape(softmax[0].shape)
        strides = grad_lse.stride()
    launch(
        attention_delta_kernel,
        (cdiv(seq_q, _DELTA_ROWS) * batch * heads,),
        out,
        do,
        *softmax,
        mu,
        grad_lse,
        rows,
        row_strides(out),
        row_strides(do),
        softmax[0].stride()[:2],
        strides,
        rows.stride()[:2],
        heads,
        seq_q,
        WIDTH=rows.shape[-1],
        BETA=mu is not None,
        HEAD_DIM_V=dim,
        BLOCK_DV=p.blocks_d[1],
        BLOCK_Q=_DELTA_ROWS,
        FLAGS=bits,
        device=out.device,
    )


def launch_walk(
    p: Problem,
    kernel,
    name: str,
    operands: dict[str, Tensor | None],
    statistics: dict[str, Tensor],
    walked: Sequence[str],
    t_mask: Tensor | None = None,
    by_key: bool = False,
) -> None:
    """Launches a kernel whose programs walk keys, or, by_key, queries.

    name: the kernel's in config.KERNELS; operands: the ``[B, H, S, D]`` tensors by their names in
    Strides; statistics: the tensors of a few numbers a row, all with the strides of the first;
    walked: the names of the operands that a program loads block by block.
    """
    tile = p.tile(name, *(operands[x] for x in walked))
    strides = Strides(
        **{x: row_strides(tensor) for x, tensor in operands.items()},
        rows=next(iter(statistics.values())).stride()[:2],
    )
    if by_key:
        heads, blocks, step = p.heads_k, cdiv(p.seq_k, tile.block_k), tile.block_q
        section = p.section(p.seq_q * p.group, p.heads_k)
    else:
        heads, blocks, step = p.heads_q, cdiv(p.seq_q, tile.block_q), tile.block_k
        section = p.section(p.seq_k, p.heads_k) * p.group
    descriptors = p.walked(tile, step, *(operands[x] for x in walked))
    pointers = {**operands, **dict(zip(walked, descriptors, strict=True)), **statistics}
    lists = mask_lists(p, tile, by_key)
    tokens_q, tokens_k = p.tokens()
    launch(
        kernel,
        (blocks * p.batch * heads,),
        **{f"p_{x}": pointer for x, pointer in pointers.items()},
        strides=strides,
        mask=Mask(p.mask, mask_strides(p.mask), *lists, t_mask, mask_strides(t_mask)),
        extras=p.shared(),
        heads=heads,
        batch_heads=p.batch * heads,
        group=p.group,
        section=section,
        tokens_q=tokens_q,
        tokens_k=tokens_k,
        **p.common(name, tile),
    )


class Tangents4(NamedTuple):
    """The tangents in 4 dimensions; the problem's FLAGS say which there are."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    mask: Tensor | None = None


def mask_gradient(
    p: Problem,
    do: Tensor,
    rows: Tensor,
    attn_mask: Tensor,
    batch: torch.Size,
    tangents: Tangents4 | None = None,
) -> Tensor:
    """E11 from the rows' softmax and Δ; beside tangents E14, from μ and β too. The kernel writes
    gradients that are broadcast over rows or columns for each batch element and head, and torch
    adds these up: more programs run at once, and the order of additions is fixed."""
    if p.mask is None:
        return torch.zeros_like(attn_mask)
    kernel = "mask_gradient" if tangents is None else "second_mask"
    tile = p.tile(kernel)
    t = tangents or Tangents4()
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
    operands: dict[str, Any] = {
        "q": p.q, "k": p.k, "v": p.v, "do": do, "t_q": t.q, "t_k": t.k, "t_v": t.v,
    }  # fmt: skip
    strides = Strides(
        **{x: row_strides(tensor) for x, tensor in operands.items()}, rows=rows.stride()[:2]
    )
    launch(
        attention_mask_gradient_kernel,
        (math.prod(outer) * row_blocks * column_blocks,),
        **{f"p_{x}": pointer for x, pointer in operands.items()},
        p_rows=rows,
        p_dm=dm,
        strides=strides,
        dm_strides=dm.stride(),
        mask=Mask(p.mask, mask_strides(p.mask), t=t.mask, t_strides=mask_strides(t.mask)),
        extras=p.shared(),
        heads=p.heads_q,
        group=p.group,
        row_blocks=row_blocks,
        column_blocks=column_blocks,
        each_batch=p.batch // outer[0] if outer[0] else 1,
        each_head=p.heads_q // outer[1] if outer[1] else 1,
        each_row=blocks[0] // row_blocks,
        each_column=blocks[1] // column_blocks,
        SHARED_ROWS=shared_rows,
        SHARED_COLUMNS=shared_columns,
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
