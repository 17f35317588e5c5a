"""What belongs to the mask: the blocks that it leaves, and the float mask's gradient, E11, and
the second order's, E14.

1. ``mask_map_kernel``: 0, 1 or 2 for each tile: hidden, seen in part, seen in full. One program for
   each tile.
2. ``mask_list_kernel``: from a row of the map the lists of its tiles of 1 and of 2.
3. ``attention_mask_gradient_kernel``: a program owns a tile of dM and walks everything that the
   mask was broadcast to, in a fixed order. With SECOND_ORDER the gradient is E instead of dS.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives, tuples, walk
from fastattn.ops.triton.attention_backward import (
    load_second_statistics,
    load_statistics,
    score_gradient,
    weights_and_gradient,
)
from fastattn.ops.triton.attention_tangent import second_gradient, weights_and_tangent


@triton.jit(do_not_specialize=["seq_q", "seq_k", "left", "right", "heads", "rows", "columns"])
def mask_map_kernel(
    p_mask,
    p_map,  # [batch, heads, rows, columns], int8
    mask_strides,  # of batch, head, row, column
    map_strides,  # of batch, head, query block, key block
    seq_q,
    seq_k,
    left,
    right,
    heads,
    rows,  # query blocks in the map: 1 where they are all alike
    columns,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLAGS: tl.constexpr,
):
    pid = tl.program_id(0)
    i_q, i_k = pid // columns % rows, pid % columns
    i_bh = pid // columns // rows
    i_b64, i_h64 = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    p_mask += i_b64 * mask_strides[0] + i_h64 * mask_strides[1]
    band = tuples.Band(seq_q, seq_k, left, right, p_mask, mask_strides)
    visible, _ = primitives.visible_keys(o_q[:, None], o_k[None, :], band, FLAGS)
    some = tl.max(tl.max((visible & (o_q < seq_q)[:, None]).to(tl.int32), 1), 0)
    every = tl.min(tl.min(visible.to(tl.int32), 1), 0)
    if flags.FLOAT_MASK & FLAGS:
        every = 0  # its numbers must be added everywhere
    p_map += i_b64 * map_strides[0] + i_h64 * map_strides[1]
    tl.store(p_map + i_q * map_strides[2] + i_k * map_strides[3], (some + every).to(tl.int8))


@triton.jit(do_not_specialize=["blocks"])
def mask_list_kernel(
    p_map,  # [rows, blocks], int8
    p_lists,  # [rows, 2, blocks], int32
    p_counts,  # [rows, 2], int32
    blocks,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_map += i_row * blocks
    p_lists += i_row * 2 * blocks
    partial = 0
    full = 0
    for first in range(0, blocks, BLOCK):
        o = first + tl.arange(0, BLOCK)
        kind = tl.load(p_map + o, mask=o < blocks, other=0)
        is_partial = (kind == 1).to(tl.int32)
        is_full = (kind == 2).to(tl.int32)
        place = partial + tl.cumsum(is_partial, 0) - 1
        tl.store(p_lists + place, o, mask=kind == 1)
        place = full + tl.cumsum(is_full, 0) - 1
        tl.store(p_lists + blocks + place, o, mask=kind == 2)
        partial += tl.sum(is_partial, 0)
        full += tl.sum(is_full, 0)
    tl.store(p_counts + i_row * 2, partial)
    tl.store(p_counts + i_row * 2 + 1, full)


@triton.jit(
    do_not_specialize=[
        "heads", "group", "seq_q", "seq_k", "left", "right", "seed_batch", "threshold",
        "row_blocks", "column_blocks", "each_batch", "each_head", "each_row", "each_column",
    ]
)  # fmt: skip
def attention_mask_gradient_kernel(
    p_q,  # [B, Hq, Sq, D]
    p_k,  # [B, Hk, Sk, D]
    p_v,  # [B, Hk, Sk, Dv]
    p_do,  # [B, Hq, Sq, Dv]
    p_t_q,  # like what they are tangents of, of the second order only
    p_t_k,
    p_t_v,
    p_rows,  # [B, Hq, Sq, WIDTH]
    p_dm,  # fp32 or fp64
    strides,  # Strides
    dm_strides,  # of batch, head, row, column
    mask,  # Mask
    extras,  # Extras
    heads,
    group,
    seq_q,
    seq_k,
    left,
    right,
    seed_batch,
    threshold,
    row_blocks,  # of dM: 1 where its rows are shared
    column_blocks,
    each_batch,  # batch elements that a program adds up
    each_head,
    each_row,  # query blocks that a program adds up
    each_column,  # key blocks
    scale: "fp64",
    cap_scale: "fp64",
    cap: "fp64",
    keep_scale: "fp64",
    SHAPE: tl.constexpr,  # Shape
    SHARED_ROWS: tl.constexpr,
    SHARED_COLUMNS: tl.constexpr,
    FLAGS: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = SHAPE.block_q
    BLOCK_K: tl.constexpr = SHAPE.block_k
    ACC: tl.constexpr = p_rows.dtype.element_ty
    WIDTH: tl.constexpr = flags.SECOND_ROW if flags.SECOND_ORDER & FLAGS else flags.ROW
    pid = tl.program_id(0)
    i_column = pid % column_blocks
    i_row = pid // column_blocks % row_blocks
    i_bh = pid // column_blocks // row_blocks
    programs_h = heads // each_head
    i_b, i_h = i_bh // programs_h * each_batch, i_bh % programs_h * each_head
    numbers = (scale, cap_scale, cap, keep_scale)
    dm = tl.zeros((BLOCK_Q, BLOCK_K), ACC)

    # main loop
    for n in range(0, each_batch * each_head * each_row * each_column):
        b = i_b + n // (each_head * each_row * each_column)
        h = i_h + n // (each_row * each_column) % each_head
        i_first = (i_row * each_row + n // each_column % each_row) * BLOCK_Q
        j_first = (i_column * each_column + n % each_column) * BLOCK_K
        at = walk.place_of_head(b, h, h // group, seq_q, seq_k, i_first)
        of = walk.weights_of(
            at, extras, mask, heads, left, right, seed_batch, threshold, numbers, ACC, FLAGS
        )
        o_q = i_first + tl.arange(0, BLOCK_Q)
        o_k = j_first + tl.arange(0, BLOCK_K)
        q, t_q = walk.query_and_tangent(p_q, p_t_q, strides, at, o_q, SHAPE, FLAGS)
        do_rows = primitives.query_rows(p_do, strides.do, at)
        do = primitives.load_rows(do_rows, o_q, SHAPE.dv, SHAPE.block_dv, True, FLAGS)
        k_rows, v_rows, t_k_rows, t_v_rows = walk.keys_and_tangents(
            p_k, p_v, p_t_k, p_t_v, strides, at, FLAGS
        )
        k = primitives.load_rows(k_rows, o_k, SHAPE.d, SHAPE.block_d, True, FLAGS)
        v = primitives.load_rows(v_rows, o_k, SHAPE.dv, SHAPE.block_dv, True, FLAGS)
        p_rows_here = walk.statistics_at(p_rows, strides.rows, at, WIDTH)
        softmax, delta = load_statistics(p_rows_here, o_q, seq_q, WIDTH)
        keep = True
        if flags.DROPOUT & FLAGS:
            keep = primitives.dropout_keep(of.dropout, o_q, j_first, BLOCK_K)
        if flags.SECOND_ORDER & FLAGS:
            t_k, t_v = k, v
            if flags.T_KEY & FLAGS:
                t_k = primitives.load_rows(t_k_rows, o_k, SHAPE.d, SHAPE.block_d, True, FLAGS)
            if flags.T_VALUE & FLAGS:
                t_v = primitives.load_rows(t_v_rows, o_k, SHAPE.dv, SHAPE.block_dv, True, FLAGS)
            mu, beta = load_second_statistics(p_rows_here, o_q, seq_q, WIDTH)
            p, tangent, _, _, visible = weights_and_tangent(
                q, t_q, k, t_k, primitives.as_column(softmax), mu[:, None], o_q[:, None],
                o_k[None, :], of, ACC, flags.T_QUERY, flags.T_KEY, True, FLAGS,
            )  # fmt: skip
            g = primitives.dot(do, tl.trans(v), ACC, FLAGS)
            keep_scale_here = of.dropout.scale
            ds = score_gradient(p, g, delta[:, None], keep, keep_scale_here, visible, True, FLAGS)
            h_tile = primitives.dot(do, tl.trans(t_v), ACC, FLAGS)
            gradient = second_gradient(
                p, ds, tangent, h_tile, beta[:, None], keep, keep_scale_here, visible, True, FLAGS
            )
        else:
            qk = primitives.dot(q, tl.trans(k), ACC, FLAGS)
            _, gradient, _, _ = weights_and_gradient(
                qk, do, v, primitives.as_column(softmax), delta[:, None], keep, o_q[:, None],
                o_k[None, :], of, ACC, True, FLAGS,
            )  # fmt: skip
        # An empty row's dO may be NaN; none of its keys is visible.
        dm += gradient  # E11, E14

    # epilogue
    i_bh64 = i_bh.to(tl.int64)
    p_dm += i_bh64 // programs_h * dm_strides[0] + i_bh64 % programs_h * dm_strides[1]
    o_q = i_row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_k = i_column * BLOCK_K + tl.arange(0, BLOCK_K)
    if SHARED_ROWS:
        tl.store(p_dm + o_k * dm_strides[3], tl.sum(dm, 0), mask=o_k < seq_k)
    elif SHARED_COLUMNS:
        tl.store(p_dm + o_q * dm_strides[2], tl.sum(dm, 1), mask=o_q < seq_q)
    else:
        p_tile = p_dm + o_q.to(tl.int64)[:, None] * dm_strides[2] + o_k[None, :] * dm_strides[3]
        tl.store(p_tile, dm, mask=(o_q < seq_q)[:, None] & (o_k < seq_k)[None, :])
