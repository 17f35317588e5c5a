"""The second order's gradient of queries, E14.

Grid: one program for each (block of BLOCK_Q queries, query head, batch), longest block first. It
walks its keys and their tangents as the forward does.
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
def _second_queries_step(
    gq,  # [BLOCK_Q, BLOCK_D]
    j_first,
    q,
    t_q,
    do,
    rows,  # softmax, Δ, μ, β
    i_first,
    i_b,
    i_h,
    i_hk,
    p_k,
    p_v,
    p_t_k,
    p_t_v,
    p_mask,
    p_t_mask,
    stride_k,
    stride_v,
    t_k_strides,
    t_v_strides,
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
    """One block of keys: E14."""
    HEAD_DIM: tl.constexpr = SHAPE[0]
    HEAD_DIM_V: tl.constexpr = SHAPE[1]
    BLOCK_D: tl.constexpr = SHAPE[2]
    BLOCK_DV: tl.constexpr = SHAPE[3]
    BLOCK_Q: tl.constexpr = SHAPE[4]
    BLOCK_K: tl.constexpr = SHAPE[5]
    o_q = i_first + tl.arange(0, BLOCK_Q)
    o_k = j_first + tl.arange(0, BLOCK_K)
    k = primitives.load_block(
        p_k, i_b, i_hk, j_first, o_k, stride_k, seq_k, HEAD_DIM, BLOCK_K, BLOCK_D, EDGE, FLAGS
    )
    v = primitives.load_block(
        p_v, i_b, i_hk, j_first, o_k, stride_v, seq_k, HEAD_DIM_V, BLOCK_K, BLOCK_DV, EDGE, FLAGS
    )
    t_k = k
    if flags.T_KEY & FLAGS:
        t_k = primitives.load_block(
            p_t_k, i_b, i_hk, j_first, o_k, t_k_strides[2], seq_k, HEAD_DIM, BLOCK_K, BLOCK_D, EDGE,
            FLAGS,
        )  # fmt: skip
    softmax, delta, mu, beta = rows
    # Each product is used before the next is made: four of them do not fit into the registers.
    p, tangent, x, capped, visible = weights_and_tangent(  # [BLOCK_Q, BLOCK_K]
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
        p_mask,
        p_t_mask,
        mask_strides,
        t_mask_strides,
        ACC,
        flags.T_QUERY,
        flags.T_KEY,
        EDGE,
        FLAGS,
    )
    keep = True
    if flags.DROPOUT & FLAGS:
        keep = primitives.dropout_keep(seed, i_h, o_q, j_first, threshold, BLOCK_K)
    g = primitives.dot(do, tl.trans(v), ACC, FLAGS)
    ds = score_gradient(p, g, delta[:, None], keep, keep_scale, visible, EDGE, FLAGS)
    h = g
    if flags.T_VALUE & FLAGS:
        t_v = primitives.load_block(
            p_t_v, i_b, i_hk, j_first, o_k, t_v_strides[2], seq_k, HEAD_DIM_V, BLOCK_K, BLOCK_DV,
            EDGE, FLAGS,
        )  # fmt: skip
        h = primitives.dot(do, tl.trans(t_v), ACC, FLAGS)
    e = second_gradient(p, ds, tangent, h, beta[:, None], keep, keep_scale, visible, EDGE, FLAGS)
    ds, e = before_softcap(ds, e, x, capped, cap_scale, FLAGS)
    if EDGE and ((flags.MASKED | flags.WINDOWED) & FLAGS):
        used = primitives.used_keys(
            visible, o_k, i_first, seq_q, seq_k, left, right, BLOCK_Q, FLAGS
        )
        k = primitives.clear_rows(k, used)
        if flags.T_KEY & FLAGS:
            t_k = primitives.clear_rows(t_k, used)
    if flags.T_KEY & FLAGS:
        gq += primitives.dot(ds.to(t_k.dtype), t_k, ACC, FLAGS)  # E14
    gq += primitives.dot(e.to(k.dtype), k, ACC, FLAGS)  # E14
    return gq


@triton.jit(
    do_not_specialize=[
        "heads", "batch_heads", "group", "section", "tokens_q", "tokens_k",
        "seq_q", "seq_k", "left", "right", "seed_batch", "threshold",
    ]
)  # fmt: skip
def attention_second_queries_kernel(
    p_q,  # [B, Hq, Sq, D]
    p_k,  # [B, Hk, Sk, D]; with TMA the tensor's descriptor
    p_v,  # [B, Hk, Sk, Dv]; the same
    p_t_q,  # like what they are tangents of
    p_t_k,
    p_t_v,
    p_do,  # [B, Hq, Sq, Dv]
    p_rows,  # [B, Hq, Sq, SECOND_ROW]
    p_gq,
    p_mask,
    p_t_mask,
    p_lists,  # [..., 2, key blocks]
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
    gq_strides,
    mask_strides,
    t_mask_strides,
    list_strides,  # of batch, head, query block
    heads,
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
    blocks = tl.cdiv(seq_q, BLOCK_Q)
    key_blocks = tl.cdiv(seq_k, BLOCK_K)
    i_block, i_h, i_b = primitives.scheduled_block(blocks, heads, batch_heads, section, True)
    i_b64, i_h64, i_hk64 = i_b.to(tl.int64), i_h.to(tl.int64), (i_h // group).to(tl.int64)
    start_q, seq_q = primitives.sequence(p_starts_q, i_b, tokens_q, seq_q, FLAGS)
    start_k, seq_k = primitives.sequence(p_starts_k, i_b, tokens_k, seq_k, FLAGS)
    i_first = i_block * BLOCK_Q
    if flags.VARLEN & FLAGS:
        if i_first >= seq_q:
            return
        i_b64 = i_b64 * 0
    o_q = i_first + tl.arange(0, BLOCK_Q)

    # this program's tensors
    p_q += i_b64 * q_strides[0] + i_h64 * q_strides[1] + start_q * q_strides[2]
    p_k = primitives.head_pointer(p_k, i_b64, i_hk64, start_k, k_strides, FLAGS)
    p_v = primitives.head_pointer(p_v, i_b64, i_hk64, start_k, v_strides, FLAGS)
    if flags.T_KEY & FLAGS:
        p_t_k = primitives.head_pointer(p_t_k, i_b64, i_hk64, start_k, t_k_strides, FLAGS)
    if flags.T_VALUE & FLAGS:
        p_t_v = primitives.head_pointer(p_t_v, i_b64, i_hk64, start_k, t_v_strides, FLAGS)
    p_do += i_b64 * do_strides[0] + i_h64 * do_strides[1] + start_q * do_strides[2]
    p_gq += i_b64 * gq_strides[0] + i_h64 * gq_strides[1] + start_q * gq_strides[2]
    row = i_b64 * row_strides[0] + i_h64 * row_strides[1] + start_q * flags.SECOND_ROW
    scale = primitives.scalar(scale, ACC)
    cap_scale = primitives.scalar(cap_scale, ACC)
    cap = primitives.scalar(cap, ACC)
    slope = 0.0
    if flags.ALIBI & FLAGS:
        slope = tl.load(p_slopes + i_b * heads + i_h)
    seed = primitives.dropout_seed(p_seed, i_b, seed_batch, FLAGS)
    if flags.MASKED & FLAGS:
        p_mask += i_b64 * mask_strides[0] + i_h64 * mask_strides[1]
        i_list = i_b64 * list_strides[0] + i_h64 * list_strides[1] + i_block * list_strides[2]
        p_counts += i_list * 2
        p_lists += i_list * 2 * key_blocks
    if flags.T_MASK & FLAGS:
        p_t_mask += i_b64 * t_mask_strides[0] + i_h64 * t_mask_strides[1]

    # prologue
    q = primitives.load_rows(p_q, o_q, q_strides[2], seq_q, HEAD_DIM, BLOCK_D, True, FLAGS)
    do = primitives.load_rows(p_do, o_q, do_strides[2], seq_q, HEAD_DIM_V, BLOCK_DV, True, FLAGS)
    softmax, delta = load_statistics(p_rows + row, o_q, seq_q, flags.SECOND_ROW)
    mu, beta = load_second_statistics(p_rows + row, o_q, seq_q, flags.SECOND_ROW)
    t_q = q
    if flags.T_QUERY & FLAGS:
        p_t_q += i_b64 * t_q_strides[0] + i_h64 * t_q_strides[1] + start_q * t_q_strides[2]
        t_q = primitives.load_rows(
            p_t_q, o_q, t_q_strides[2], seq_q, HEAD_DIM, BLOCK_D, True, FLAGS
        )
    if flags.MAY_BE_EMPTY & FLAGS:
        q = primitives.clear_rows(q, softmax[0] != float("inf"))
        t_q = primitives.clear_rows(t_q, softmax[0] != float("inf"))
        do = primitives.clear_rows(do, softmax[0] != float("inf"))
    gq = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    args = (
        q,
        t_q,
        do,
        (softmax, delta, mu, beta),
        i_first,
        i_b,
        i_h,
        i_h // group,
        p_k,
        p_v,
        p_t_k,
        p_t_v,
        p_mask,
        p_t_mask,
        k_strides[2],
        v_strides[2],
        t_k_strides,
        t_v_strides,
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
        primitives.scalar(keep_scale, ACC),
        seed,
        threshold,
    )

    # main loops
    if flags.MASKED & FLAGS:
        for n in range(0, tl.load(p_counts)):
            j_first = tl.load(p_lists + n) * BLOCK_K
            gq = _second_queries_step(gq, j_first, *args, SHAPE, ACC, True, FLAGS)
        if flags.BOOL_MASK & FLAGS:
            for n in range(0, tl.load(p_counts + 1)):
                j_first = tl.load(p_lists + key_blocks + n) * BLOCK_K
                gq = _second_queries_step(gq, j_first, *args, SHAPE, ACC, False, FLAGS)
    else:
        lo, full_lo, full_hi, hi = primitives.key_range(
            i_first, seq_q, seq_k, left, right, BLOCK_Q, BLOCK_K, FLAGS
        )
        if flags.WINDOW_LEFT & FLAGS:
            for j_first in range(lo, full_lo, BLOCK_K):
                gq = _second_queries_step(gq, j_first, *args, SHAPE, ACC, True, FLAGS)
        for j_first in range(full_lo, full_hi, BLOCK_K):
            j_first = tl.multiple_of(j_first, BLOCK_K)
            gq = _second_queries_step(gq, j_first, *args, SHAPE, ACC, False, FLAGS)
        for j_first in range(full_hi, hi, BLOCK_K):
            gq = _second_queries_step(gq, j_first, *args, SHAPE, ACC, True, FLAGS)

    # epilogue
    gq *= scale
    primitives.store_rows(p_gq, o_q, gq, gq_strides[2], seq_q, HEAD_DIM, BLOCK_D, FLAGS)
