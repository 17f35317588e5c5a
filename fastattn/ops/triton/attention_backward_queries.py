"""The gradient of queries, E6-E8.

Grid: one program for each (block of BLOCK_Q queries, query head, batch), longest block first. It
walks its keys as the forward does.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives
from fastattn.ops.triton.attention_backward import (
    load_statistics,
    weights_and_gradient,
)


@triton.jit
def _queries_step(
    dq,  # [BLOCK_Q, BLOCK_D]
    q,
    do,
    softmax,
    delta,
    j_first,
    i_first,
    i_b,
    i_h,
    i_hk,
    p_k,
    p_v,
    p_mask,
    stride_k,
    stride_v,
    mask_strides,
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
    """One block of keys: E6-E8."""
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
    qk = primitives.dot(q, tl.trans(k), ACC, FLAGS)  # [BLOCK_Q, BLOCK_K]
    keep = True
    if flags.DROPOUT & FLAGS:
        keep = primitives.dropout_keep(seed, i_h, o_q, j_first, threshold, BLOCK_K)
    _, ds, capped, visible = weights_and_gradient(
        qk,
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
        p_mask,
        mask_strides,
        ACC,
        EDGE,
        FLAGS,
    )
    if flags.SOFTCAP & FLAGS:
        ds *= 1.0 - capped * capped
    if EDGE and ((flags.MASKED | flags.WINDOWED) & FLAGS):
        used = primitives.used_keys(
            visible, o_k, i_first, seq_q, seq_k, left, right, BLOCK_Q, FLAGS
        )
        k = primitives.clear_rows(k, used)
    dq += primitives.dot(ds.to(k.dtype), k, ACC, FLAGS)  # E8
    return dq


@triton.jit(
    do_not_specialize=[
        "heads", "batch_heads", "group", "section", "tokens_q", "tokens_k",
        "seq_q", "seq_k", "left", "right", "seed_batch", "threshold",
    ]
)  # fmt: skip
def attention_backward_queries_kernel(
    p_q,  # [B, Hq, Sq, D]
    p_k,  # [B, Hk, Sk, D]; with TMA the tensor's descriptor
    p_v,  # [B, Hk, Sk, Dv]; the same
    p_do,  # [B, Hq, Sq, Dv]
    p_rows,  # [B, Hq, Sq, ROW]
    p_dq,
    p_mask,
    p_lists,  # [..., 2, key blocks]
    p_counts,  # [..., 2]
    p_slopes,
    p_seed,
    p_starts_q,
    p_starts_k,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    row_strides,  # of batch, head
    dq_strides,
    mask_strides,
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
    seed_batch,  # batch elements that share a seed
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
    p_do += i_b64 * do_strides[0] + i_h64 * do_strides[1] + start_q * do_strides[2]
    p_dq += i_b64 * dq_strides[0] + i_h64 * dq_strides[1] + start_q * dq_strides[2]
    p_rows += i_b64 * row_strides[0] + i_h64 * row_strides[1] + start_q * flags.ROW
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

    # prologue
    q = primitives.load_rows(p_q, o_q, q_strides[2], seq_q, HEAD_DIM, BLOCK_D, True, FLAGS)
    do = primitives.load_rows(p_do, o_q, do_strides[2], seq_q, HEAD_DIM_V, BLOCK_DV, True, FLAGS)
    softmax, delta = load_statistics(p_rows, o_q, seq_q, flags.ROW)
    if flags.MAY_BE_EMPTY & FLAGS:
        q = primitives.clear_rows(q, softmax[0] != float("inf"))
        do = primitives.clear_rows(do, softmax[0] != float("inf"))
    dq = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    args = (
        i_first,
        i_b,
        i_h,
        i_h // group,
        p_k,
        p_v,
        p_mask,
        k_strides[2],
        v_strides[2],
        mask_strides,
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
            dq = _queries_step(dq, q, do, softmax, delta, j_first, *args, SHAPE, ACC, True, FLAGS)
        if flags.BOOL_MASK & FLAGS:
            for n in range(0, tl.load(p_counts + 1)):
                j_first = tl.load(p_lists + key_blocks + n) * BLOCK_K
                dq = _queries_step(
                    dq, q, do, softmax, delta, j_first, *args, SHAPE, ACC, False, FLAGS
                )
    else:
        lo, full_lo, full_hi, hi = primitives.key_range(
            i_first, seq_q, seq_k, left, right, BLOCK_Q, BLOCK_K, FLAGS
        )
        if flags.WINDOW_LEFT & FLAGS:
            for j_first in range(lo, full_lo, BLOCK_K):
                dq = _queries_step(
                    dq, q, do, softmax, delta, j_first, *args, SHAPE, ACC, True, FLAGS
                )
        for j_first in range(full_lo, full_hi, BLOCK_K):
            j_first = tl.multiple_of(j_first, BLOCK_K)
            dq = _queries_step(dq, q, do, softmax, delta, j_first, *args, SHAPE, ACC, False, FLAGS)
        for j_first in range(full_hi, hi, BLOCK_K):
            dq = _queries_step(dq, q, do, softmax, delta, j_first, *args, SHAPE, ACC, True, FLAGS)

    # epilogue
    dq *= scale
    primitives.store_rows(p_dq, o_q, dq, dq_strides[2], seq_q, HEAD_DIM, BLOCK_D, FLAGS)
