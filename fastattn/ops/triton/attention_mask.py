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

from fastattn.ops.triton import flags, primitives
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
    visible, _ = primitives.visible_keys(
        o_q[:, None], o_k[None, :], seq_k, left, right, p_mask, mask_strides, seq_q, FLAGS
    )
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
    p_mask,
    p_t_mask,
    p_slopes,
    p_seed,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    t_q_strides,
    t_k_strides,
    t_v_strides,
    row_strides,  # of batch, head
    dm_strides,  # of batch, head, row, column
    mask_strides,
    t_mask_strides,
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
    SHAPE: tl.constexpr,  # D, Dv, both rounded up, rows and columns of the tile
    SHARED_ROWS: tl.constexpr,
    SHARED_COLUMNS: tl.constexpr,
    FLAGS: tl.constexpr,
):
    # ids
    HEAD_DIM: tl.constexpr = SHAPE[0]
    HEAD_DIM_V: tl.constexpr = SHAPE[1]
    BLOCK_D: tl.constexpr = SHAPE[2]
    BLOCK_DV: tl.constexpr = SHAPE[3]
    BLOCK_Q: tl.constexpr = SHAPE[4]
    BLOCK_K: tl.constexpr = SHAPE[5]
    ACC: tl.constexpr = p_rows.dtype.element_ty
    WIDTH: tl.constexpr = flags.SECOND_ROW if flags.SECOND_ORDER & FLAGS else flags.ROW
    pid = tl.program_id(0)
    i_column = pid % column_blocks
    i_row = pid // column_blocks % row_blocks
    i_bh = pid // column_blocks // row_blocks
    programs_h = heads // each_head
    i_b, i_h = i_bh // programs_h * each_batch, i_bh % programs_h * each_head
    scale = primitives.scalar(scale, ACC)
    cap_scale = primitives.scalar(cap_scale, ACC)
    cap = primitives.scalar(cap, ACC)
    keep_scale = primitives.scalar(keep_scale, ACC)
    dm = tl.zeros((BLOCK_Q, BLOCK_K), ACC)

    # main loop
    for n in range(0, each_batch * each_head * each_row * each_column):
        b = i_b + n // (each_head * each_row * each_column)
        h = i_h + n // (each_row * each_column) % each_head
        i_first = (i_row * each_row + n // each_column % each_row) * BLOCK_Q
        j_first = (i_column * each_column + n % each_column) * BLOCK_K
        o_k = j_first + tl.arange(0, BLOCK_K)
        b64, h64, hk64 = b.to(tl.int64), h.to(tl.int64), (h // group).to(tl.int64)
        o_q = i_first + tl.arange(0, BLOCK_Q)
        p_mask_here = p_mask + b64 * mask_strides[0] + h64 * mask_strides[1]
        q = primitives.load_rows(
            p_q + b64 * q_strides[0] + h64 * q_strides[1],
            o_q, q_strides[2], seq_q, HEAD_DIM, BLOCK_D, True, FLAGS,
        )  # fmt: skip
        do = primitives.load_rows(
            p_do + b64 * do_strides[0] + h64 * do_strides[1],
            o_q, do_strides[2], seq_q, HEAD_DIM_V, BLOCK_DV, True, FLAGS,
        )  # fmt: skip
        k = primitives.load_rows(
            p_k + b64 * k_strides[0] + hk64 * k_strides[1],
            o_k, k_strides[2], seq_k, HEAD_DIM, BLOCK_D, True, FLAGS,
        )  # fmt: skip
        v = primitives.load_rows(
            p_v + b64 * v_strides[0] + hk64 * v_strides[1],
            o_k, v_strides[2], seq_k, HEAD_DIM_V, BLOCK_DV, True, FLAGS,
        )  # fmt: skip
        row = b64 * row_strides[0] + h64 * row_strides[1]
        softmax, delta = load_statistics(p_rows + row, o_q, seq_q, WIDTH)
        slope = 0.0
        if flags.ALIBI & FLAGS:
            slope = tl.load(p_slopes + b * heads + h)
        keep = True
        if flags.DROPOUT & FLAGS:
            seed = primitives.dropout_seed(p_seed, b, seed_batch, FLAGS)
            keep = primitives.dropout_keep(seed, h, o_q, j_first, threshold, BLOCK_K)
        if flags.SECOND_ORDER & FLAGS:
            t_q, t_k, t_v = q, k, v
            if flags.T_QUERY & FLAGS:
                t_q = primitives.load_rows(
                    p_t_q + b64 * t_q_strides[0] + h64 * t_q_strides[1],
                    o_q, t_q_strides[2], seq_q, HEAD_DIM, BLOCK_D, True, FLAGS,
                )  # fmt: skip
            if flags.T_KEY & FLAGS:
                t_k = primitives.load_rows(
                    p_t_k + b64 * t_k_strides[0] + hk64 * t_k_strides[1],
                    o_k, t_k_strides[2], seq_k, HEAD_DIM, BLOCK_D, True, FLAGS,
                )  # fmt: skip
            if flags.T_VALUE & FLAGS:
                t_v = primitives.load_rows(
                    p_t_v + b64 * t_v_strides[0] + hk64 * t_v_strides[1],
                    o_k, t_v_strides[2], seq_k, HEAD_DIM_V, BLOCK_DV, True, FLAGS,
                )  # fmt: skip
            p_t_mask_here = 0
            if flags.T_MASK & FLAGS:
                p_t_mask_here = p_t_mask + b64 * t_mask_strides[0] + h64 * t_mask_strides[1]
            mu, beta = load_second_statistics(p_rows + row, o_q, seq_q, WIDTH)
            p, tangent, _, _, visible = weights_and_tangent(
                q,
                t_q,
                k,
                t_k,
                primitives.as_column(softmax),
                mu[:, None],
                o_q[:, None],
                o_k[None, :],
                seq_q,
                seq_k,
                left,
                right,
                scale,
                cap_scale,
                cap,
                slope,
                p_mask_here,
                p_t_mask_here,
                mask_strides,
                t_mask_strides,
                ACC,
                flags.T_QUERY,
                flags.T_KEY,
                True,
                FLAGS,
            )
            g = primitives.dot(do, tl.trans(v), ACC, FLAGS)
            ds = score_gradient(p, g, delta[:, None], keep, keep_scale, visible, True, FLAGS)
            h = primitives.dot(do, tl.trans(t_v), ACC, FLAGS)
            gradient = second_gradient(
                p, ds, tangent, h, beta[:, None], keep, keep_scale, visible, True, FLAGS
            )
        else:
            _, gradient, _, _ = weights_and_gradient(
                primitives.dot(q, tl.trans(k), ACC, FLAGS),
                do,
                v,
                primitives.as_column(softmax),
                delta[:, None],
                keep,
                o_q[:, None],
                o_k[None, :],
                seq_q,
                seq_k,
                left,
                right,
                scale,
                cap_scale,
                cap,
                slope,
                keep_scale,
                p_mask_here,
                mask_strides,
                ACC,
                True,
                FLAGS,
            )
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
