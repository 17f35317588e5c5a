"""The second order's gradients of keys and values, E14.

Grid: one program for each (block of BLOCK_K keys, key head, batch). It walks the queries that see
its keys, and their tangents, in every query head of the group; its tiles are transposed,
``[BLOCK_K, BLOCK_Q]``.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives
from fastattn.ops.triton.attention_backward import (
    load_second_statistics,
    load_statistics,
    score_gradient,
)
from fastattn.ops.triton.attention_tangent import (
    before_softcap,
    second_gradient,
    weights_and_tangent,
)


@triton.jit
def _second_keys_step(
    gk,  # [BLOCK_K, BLOCK_D]
    gv,  # [BLOCK_K, BLOCK_DV]
    i_first,
    k,
    v,
    t_k,
    t_v,
    j_first,
    i_b,
    i_h,
    p_q,
    p_t_q,
    p_do,
    p_rows,
    p_mask,
    p_t_mask,
    stride_q,
    t_q_strides,
    stride_do,
    mask_strides,
    t_mask_strides,
    seq_q,
    seq_k,
    left,
    right,
    scale,
    cap_scale,
    cap,
    slope,
    keep_scale,
    seed,
    threshold,
    SHAPE: tl.constexpr,  # D, Dv, both rounded up, rows and columns of the tile
    ACC: tl.constexpr,
    EDGE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """One block of queries: E14."""
    HEAD_DIM: tl.constexpr = SHAPE[0]
    HEAD_DIM_V: tl.constexpr = SHAPE[1]
    BLOCK_D: tl.constexpr = SHAPE[2]
    BLOCK_DV: tl.constexpr = SHAPE[3]
    BLOCK_Q: tl.constexpr = SHAPE[4]
    BLOCK_K: tl.constexpr = SHAPE[5]
    o_q = i_first + tl.arange(0, BLOCK_Q)
    o_k = j_first + tl.arange(0, BLOCK_K)
    q = primitives.load_block(
        p_q, i_b, i_h, i_first, o_q, stride_q, seq_q, HEAD_DIM, BLOCK_Q, BLOCK_D, True, FLAGS
    )
    do = primitives.load_block(
        p_do, i_b, i_h, i_first, o_q, stride_do, seq_q, HEAD_DIM_V, BLOCK_Q, BLOCK_DV, True, FLAGS
    )
    t_q = q
    if flags.T_QUERY & FLAGS:
        t_q = primitives.load_block(
            p_t_q, i_b, i_h, i_first, o_q, t_q_strides[2], seq_q, HEAD_DIM, BLOCK_Q, BLOCK_D, True,
            FLAGS,
        )  # fmt: skip
    softmax, delta = load_statistics(p_rows, o_q, seq_q, flags.SECOND_ROW)
    mu, beta = load_second_statistics(p_rows, o_q, seq_q, flags.SECOND_ROW)
    if flags.MAY_BE_EMPTY & FLAGS:
        q = primitives.clear_rows(q, softmax[0] != float("inf"))
        t_q = primitives.clear_rows(t_q, softmax[0] != float("inf"))
        do = primitives.clear_rows(do, softmax[0] != float("inf"))
    # Each product is used before the next is made: four of them do not fit into the registers.
    p, tangent, x, capped, visible = weights_and_tangent(  # [BLOCK_K, BLOCK_Q]
        k,
        t_k,
        q,
        t_q,
        primitives.as_row(softmax),
        mu[None, :],
        o_q[None, :],
        o_k[:, None],
        seq_q,
        seq_k,
        left,
        right,
        scale,
        cap_scale,
        cap,
        slope,
        p_mask,
        p_t_mask,
        mask_strides,
        t_mask_strides,
        ACC,
        flags.T_KEY,
        flags.T_QUERY,
        EDGE,
        FLAGS,
    )
    keep = True
    if flags.DROPOUT & FLAGS:
        keep = tl.trans(primitives.dropout_keep(seed, i_h, o_q, j_first, threshold, BLOCK_K))
    if flags.T_SCORES & FLAGS:
        w = p * tangent
        if flags.DROPOUT & FLAGS:
            w = tl.where(keep, w, 0.0)
        gv += primitives.dot(w.to(do.dtype), do, ACC, FLAGS)  # E14
    g = primitives.dot(v, tl.trans(do), ACC, FLAGS)
    ds = score_gradient(p, g, delta[None, :], keep, keep_scale, visible, EDGE, FLAGS)
    h = g
    if flags.T_VALUE & FLAGS:
        h = primitives.dot(t_v, tl.trans(do), ACC, FLAGS)
    e = second_gradient(p, ds, tangent, h, beta[None, :], keep, keep_scale, visible, EDGE, FLAGS)
    ds, e = before_softcap(ds, e, x, capped, cap_scale, FLAGS)
    if flags.T_QUERY & FLAGS:
        gk += primitives.dot(ds.to(t_q.dtype), t_q, ACC, FLAGS)  # E14
    gk += primitives.dot(e.to(q.dtype), q, ACC, FLAGS)  # E14
    return gk, gv


@triton.jit(
    do_not_specialize=[
        "heads", "batch_heads", "section", "tokens_q", "tokens_k",
        "seq_q", "seq_k", "left", "right", "seed_batch", "threshold",
    ]
)  # fmt: skip
def attention_second_keys_kernel(
    p_q,  # [B, Hq, Sq, D]; with TMA the tensor's descriptor
    p_k,  # [B, Hk, Sk, D]
    p_v,  # [B, Hk, Sk, Dv]
    p_t_q,  # like what they are tangents of; p_t_q's descriptor with TMA
    p_t_k,
    p_t_v,
    p_do,  # [B, Hq, Sq, Dv]; with TMA the tensor's descriptor
    p_rows,  # [B, Hq, Sq, SECOND_ROW]
    p_gk,
    p_gv,
    p_mask,
    p_t_mask,
    p_lists,  # [..., 2, query blocks]
    p_counts,  # [..., 2]
    p_slopes,
    p_seed,
    p_starts_q,
    p_starts_k,
    q_strides,
    k_strides,
    v_strides,
    t_q_strides,
    t_k_strides,
    t_v_strides,
    do_strides,
    row_strides,  # of batch, head
    gk_strides,
    gv_strides,
    mask_strides,
    t_mask_strides,
    list_strides,  # of batch, head, key block
    heads,  # key heads
    batch_heads,
    group,
    section,
    tokens_q,
    tokens_k,
    seq_q,
    seq_k,
    left,
    right,
    seed_batch,
    threshold,
    scale: "fp64",
    cap_scale: "fp64",
    cap: "fp64",
    keep_scale: "fp64",
    SHAPE: tl.constexpr,  # D, Dv, both rounded up, rows and columns of the tile
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
    blocks = tl.cdiv(seq_k, BLOCK_K)
    query_blocks = tl.cdiv(seq_q, BLOCK_Q)
    # Under a causal mask the first keys are seen by the most queries.
    i_block, i_hk, i_b = primitives.scheduled_block(blocks, heads, batch_heads, section, False)
    i_b64, i_hk64 = i_b.to(tl.int64), i_hk.to(tl.int64)
    start_q, seq_q = primitives.sequence(p_starts_q, i_b, tokens_q, seq_q, FLAGS)
    start_k, seq_k = primitives.sequence(p_starts_k, i_b, tokens_k, seq_k, FLAGS)
    j_first = i_block * BLOCK_K
    if flags.VARLEN & FLAGS:
        if j_first >= seq_k:
            return
        i_b64 = i_b64 * 0
    o_k = j_first + tl.arange(0, BLOCK_K)

    # this program's tensors
    p_k += i_b64 * k_strides[0] + i_hk64 * k_strides[1] + start_k * k_strides[2]
    p_v += i_b64 * v_strides[0] + i_hk64 * v_strides[1] + start_k * v_strides[2]
    p_gk += i_b64 * gk_strides[0] + i_hk64 * gk_strides[1] + start_k * gk_strides[2]
    p_gv += i_b64 * gv_strides[0] + i_hk64 * gv_strides[1] + start_k * gv_strides[2]
    scale = primitives.scalar(scale, ACC)
    cap_scale = primitives.scalar(cap_scale, ACC)
    cap = primitives.scalar(cap, ACC)
    keep_scale = primitives.scalar(keep_scale, ACC)
    seed = primitives.dropout_seed(p_seed, i_b, seed_batch, FLAGS)

    # prologue
    k = primitives.load_rows(p_k, o_k, k_strides[2], seq_k, HEAD_DIM, BLOCK_D, True, FLAGS)
    v = primitives.load_rows(p_v, o_k, v_strides[2], seq_k, HEAD_DIM_V, BLOCK_DV, True, FLAGS)
    t_k = k
    if flags.T_KEY & FLAGS:
        p_t_k += i_b64 * t_k_strides[0] + i_hk64 * t_k_strides[1] + start_k * t_k_strides[2]
        t_k = primitives.load_rows(
            p_t_k, o_k, t_k_strides[2], seq_k, HEAD_DIM, BLOCK_D, True, FLAGS
        )
    t_v = v
    if flags.T_VALUE & FLAGS:
        p_t_v += i_b64 * t_v_strides[0] + i_hk64 * t_v_strides[1] + start_k * t_v_strides[2]
        t_v = primitives.load_rows(
            p_t_v, o_k, t_v_strides[2], seq_k, HEAD_DIM_V, BLOCK_DV, True, FLAGS
        )
    gk = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    gv = tl.zeros((BLOCK_K, BLOCK_DV), ACC)

    # main loops
    for i_group in range(0, group):
        i_h = i_hk * group + i_group
        i_h64 = i_h.to(tl.int64)
        slope = 0.0
        if flags.ALIBI & FLAGS:
            slope = tl.load(p_slopes + i_b * (heads * group) + i_h)
        row = i_b64 * row_strides[0] + i_h64 * row_strides[1] + start_q * flags.SECOND_ROW
        p_mask_h, p_t_mask_h, p_t_q_h = 0, 0, 0
        if flags.MASKED & FLAGS:
            p_mask_h = p_mask + i_b64 * mask_strides[0] + i_h64 * mask_strides[1]
        if flags.T_MASK & FLAGS:
            p_t_mask_h = p_t_mask + i_b64 * t_mask_strides[0] + i_h64 * t_mask_strides[1]
        if flags.T_QUERY & FLAGS:
            p_t_q_h = primitives.head_pointer(p_t_q, i_b64, i_h64, start_q, t_q_strides, FLAGS)
        args = (
            k,
            v,
            t_k,
            t_v,
            j_first,
            i_b,
            i_h,
            primitives.head_pointer(p_q, i_b64, i_h64, start_q, q_strides, FLAGS),
            p_t_q_h,
            primitives.head_pointer(p_do, i_b64, i_h64, start_q, do_strides, FLAGS),
            p_rows + row,
            p_mask_h,
            p_t_mask_h,
            q_strides[2],
            t_q_strides,
            do_strides[2],
            mask_strides,
            t_mask_strides,
            seq_q,
            seq_k,
            left,
            right,
            scale,
            cap_scale,
            cap,
            slope,
            keep_scale,
            seed,
            threshold,
        )
        if flags.MASKED & FLAGS:
            i_list = i_b64 * list_strides[0] + i_h64 * list_strides[1] + i_block * list_strides[2]
            p_count = p_counts + i_list * 2
            p_list = p_lists + i_list * 2 * query_blocks
            for n in range(0, tl.load(p_count)):
                i_first = tl.load(p_list + n) * BLOCK_Q
                gk, gv = _second_keys_step(gk, gv, i_first, *args, SHAPE, ACC, True, FLAGS)
            if flags.BOOL_MASK & FLAGS:
                for n in range(0, tl.load(p_count + 1)):
                    i_first = tl.load(p_list + query_blocks + n) * BLOCK_Q
                    gk, gv = _second_keys_step(gk, gv, i_first, *args, SHAPE, ACC, False, FLAGS)
        else:
            lo, full_lo, full_hi, hi = primitives.query_range(
                j_first, seq_q, seq_k, left, right, BLOCK_Q, BLOCK_K, FLAGS
            )
            if flags.WINDOW_RIGHT & FLAGS:
                for i_first in range(lo, full_lo, BLOCK_Q):
                    gk, gv = _second_keys_step(gk, gv, i_first, *args, SHAPE, ACC, True, FLAGS)
            for i_first in range(full_lo, full_hi, BLOCK_Q):
                i_first = tl.multiple_of(i_first, BLOCK_Q)
                gk, gv = _second_keys_step(gk, gv, i_first, *args, SHAPE, ACC, False, FLAGS)
            if flags.WINDOW_LEFT & FLAGS:
                for i_first in range(full_hi, hi, BLOCK_Q):
                    gk, gv = _second_keys_step(gk, gv, i_first, *args, SHAPE, ACC, True, FLAGS)

    # epilogue
    gk *= scale
    if flags.DROPOUT & FLAGS:
        gv *= keep_scale
    primitives.store_rows(p_gk, o_k, gk, gk_strides[2], seq_k, HEAD_DIM, BLOCK_D, FLAGS)
    primitives.store_rows(p_gv, o_k, gv, gv_strides[2], seq_k, HEAD_DIM_V, BLOCK_DV, FLAGS)
