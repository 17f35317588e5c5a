"""The attention forward kernel, E1-E5.

Grid: one program for each (block of BLOCK_Q queries, query head, batch), longest block first.
A program owns its rows of O and LSE and walks the keys that its rows can see: a masked range at
either edge of the window and an unmasked one between; beside a mask, the lists of key blocks that
the mask leaves in part and in full.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives
from fastattn.ops.triton.primitives import LN_2, LOG2_E


@triton.jit
def _forward_step(
    o_acc,  # [BLOCK_Q, BLOCK_DV]
    m,  # [BLOCK_Q]
    l,  # [BLOCK_Q]
    q,  # [BLOCK_Q, BLOCK_D]
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
    seed,
    threshold,
    SHAPE: tl.constexpr,  # D, Dv, both rounded up, rows and columns of the tile
    ACC: tl.constexpr,
    EDGE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """One block of keys: E1-E4."""
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
    qk = primitives.dot(q, tl.trans(k), ACC, FLAGS)  # [BLOCK_Q, BLOCK_K]
    v = primitives.load_block(
        p_v, i_b, i_hk, j_first, o_k, stride_v, seq_k, HEAD_DIM_V, BLOCK_K, BLOCK_DV, EDGE, FLAGS
    )
    s = qk
    if EDGE or (flags.SCALED & FLAGS):
        s, _, visible = primitives.scores(
            qk,
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
            mask_strides,
            EDGE,
            FLAGS,
        )
        if EDGE and ((flags.MASKED | flags.WINDOWED) & FLAGS):
            used = primitives.used_keys(
                visible, o_k, i_first, seq_q, seq_k, left, right, BLOCK_Q, FLAGS
            )
            v = primitives.clear_rows(v, used)
    m_new = tl.maximum(m, tl.max(s, 1))  # E2
    m_safe = m_new
    if flags.MAY_BE_EMPTY & FLAGS:
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    factor = primitives.unit_of_scores(scale, FLAGS) * LOG2_E
    p = tl.exp2((s - m_safe[:, None]) * factor)  # E3
    shrink = tl.exp2((m - m_safe) * factor)
    l = l * shrink + tl.sum(p, 1)  # E3
    o_acc = o_acc * shrink[:, None]  # E4
    if flags.DROPOUT & FLAGS:
        keep = primitives.dropout_keep(seed, i_h, o_q, j_first, threshold, BLOCK_K)
        p = tl.where(keep, p, 0.0)
    o_acc += primitives.dot(p.to(v.dtype), v, ACC, FLAGS)  # E4
    return o_acc, m_new, l


@triton.jit
def _overflowed(
    empty,  # [BLOCK_Q]: rows without a sum
    o_q,
    p_counts,
    p_lists,
    p_mask,
    mask_strides,
    seq_q,
    seq_k,
    left,
    right,
    BLOCK_K: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Which of the empty rows see a key after all: their scores are -inf, products that
    overflowed."""
    see = o_q * 0
    if flags.MASKED & FLAGS:
        if tl.max(empty.to(tl.int32), 0) != 0:
            if flags.BOOL_MASK & FLAGS:
                see += tl.load(p_counts + 1)  # blocks that every row sees
            for n in range(0, tl.load(p_counts)):
                o_k = tl.load(p_lists + n) * BLOCK_K + tl.arange(0, BLOCK_K)
                visible, _ = primitives.visible_keys(
                    o_q[:, None], o_k[None, :], seq_k, left, right, p_mask, mask_strides, seq_q,
                    FLAGS,
                )  # fmt: skip
                see += tl.max(visible.to(tl.int32), 1)
    else:
        first = tl.maximum(see, o_q - left)
        last = see + seq_k - 1
        if flags.WINDOW_RIGHT & FLAGS:
            last = tl.minimum(last, o_q + right)
        see = (first <= last).to(tl.int32)
    return empty & (see != 0)


@triton.jit(
    do_not_specialize=[
        "heads", "batch_heads", "group", "section", "tokens_q", "tokens_k",
        "seq_q", "seq_k", "left", "right", "seed_batch", "threshold",
    ]
)  # fmt: skip
def attention_forward_kernel(
    p_q,  # [B, Hq, Sq, D]
    p_k,  # [B, Hk, Sk, D]; with TMA the tensor's descriptor
    p_v,  # [B, Hk, Sk, Dv]; the same
    p_o,  # [B, Hq, Sq, Dv]
    p_lse,  # [B, Hq, Sq]
    p_max,  # its parts, laid out alike
    p_log_sum,
    p_mask,  # [B, Hq, Sq, Sk]: bytes or floats
    p_lists,  # [..., 2, key blocks]: those that the mask leaves in part; in full
    p_counts,  # [..., 2]
    p_slopes,  # [B, Hq]
    p_seed,  # [B / seed_batch]
    p_starts_q,  # [B + 1]
    p_starts_k,  # [B + 1]
    q_strides,  # of batch, head, row
    k_strides,
    v_strides,
    o_strides,
    lse_strides,  # of batch, head
    mask_strides,  # of batch, head, row, column; 0 where broadcast
    list_strides,  # of batch, head, query block: in p_counts, in pairs
    heads,
    batch_heads,
    group,  # query heads that share a key head
    section,
    tokens_q,
    tokens_k,
    seq_q,  # the longest, where there are several
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
    ACC: tl.constexpr = p_lse.dtype.element_ty
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
    p_o += i_b64 * o_strides[0] + i_h64 * o_strides[1] + start_q * o_strides[2]
    row = i_b64 * lse_strides[0] + i_h64 * lse_strides[1] + start_q
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
    o_acc = tl.zeros((BLOCK_Q, BLOCK_DV), ACC)
    m = tl.full((BLOCK_Q,), float("-inf"), ACC)
    l = tl.zeros((BLOCK_Q,), ACC)
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
        seed,
        threshold,
    )

    # main loops
    if flags.MASKED & FLAGS:
        for n in range(0, tl.load(p_counts)):
            j_first = tl.load(p_lists + n) * BLOCK_K
            o_acc, m, l = _forward_step(o_acc, m, l, q, j_first, *args, SHAPE, ACC, True, FLAGS)
        if flags.BOOL_MASK & FLAGS:
            for n in range(0, tl.load(p_counts + 1)):
                j_first = tl.load(p_lists + key_blocks + n) * BLOCK_K
                o_acc, m, l = _forward_step(
                    o_acc, m, l, q, j_first, *args, SHAPE, ACC, False, FLAGS
                )
    else:
        lo, full_lo, full_hi, hi = primitives.key_range(
            i_first, seq_q, seq_k, left, right, BLOCK_Q, BLOCK_K, FLAGS
        )
        if flags.WINDOW_LEFT & FLAGS:
            for j_first in range(lo, full_lo, BLOCK_K):
                o_acc, m, l = _forward_step(o_acc, m, l, q, j_first, *args, SHAPE, ACC, True, FLAGS)
        for j_first in range(full_lo, full_hi, BLOCK_K):
            j_first = tl.multiple_of(j_first, BLOCK_K)
            o_acc, m, l = _forward_step(o_acc, m, l, q, j_first, *args, SHAPE, ACC, False, FLAGS)
        for j_first in range(full_hi, hi, BLOCK_K):
            o_acc, m, l = _forward_step(o_acc, m, l, q, j_first, *args, SHAPE, ACC, True, FLAGS)

    # epilogue
    empty = l == 0.0
    if flags.DROPOUT & FLAGS:
        o_acc = o_acc * primitives.scalar(keep_scale, ACC)
    total = tl.where(empty, 1.0, l)
    o = tl.where(empty[:, None], 0.0, o_acc / total[:, None])  # E5
    log_sum = tl.log2(total) * LN_2
    m = tl.where(log_sum == log_sum, m, log_sum)  # a NaN in all the row
    if flags.MAY_BE_EMPTY & FLAGS:  # a NaN, as a softmax of -inf alone is
        overflowed = _overflowed(
            empty, o_q, p_counts, p_lists, p_mask, mask_strides, seq_q, seq_k, left, right,
            BLOCK_K, FLAGS,
        )  # fmt: skip
        o = tl.where(overflowed[:, None], float("nan"), o)
        m = tl.where(overflowed, float("nan"), m)
    primitives.store_rows(p_o, o_q, o, o_strides[2], seq_q, HEAD_DIM_V, BLOCK_DV, FLAGS)
    row += o_q
    lse = m * primitives.unit_of_scores(scale, FLAGS) + log_sum  # E5
    tl.store(p_lse + row, lse, mask=o_q < seq_q)
    tl.store(p_max + row, m, mask=o_q < seq_q)
    tl.store(p_log_sum + row, log_sum, mask=o_q < seq_q)
