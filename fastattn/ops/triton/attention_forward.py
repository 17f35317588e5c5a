"""The attention forward kernel, E1-E5.

Grid: one program for each (block of BLOCK_Q queries, query head, batch), longest block first.
A program owns its rows of O and LSE and walks the keys that its rows can see: a masked range at
either edge of the window and an unmasked one between; beside a mask, the lists of key blocks that
the mask leaves in part and in full.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives, walk
from fastattn.ops.triton.primitives import LN_2, LOG2_E


@triton.jit
def _step(
    state,
    j_first,
    own,
    walked,
    at,
    of,
    SHAPE: tl.constexpr,
    ACC: tl.constexpr,
    EDGE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """O before its division, m and l after one block of keys: E1-E4."""
    o_acc, m, l = state  # [BLOCK_Q, BLOCK_DV], [BLOCK_Q], [BLOCK_Q]
    q = own
    k_rows, v_rows = walked
    o_q = at.first + tl.arange(0, SHAPE.block_q)
    o_k = j_first + tl.arange(0, SHAPE.block_k)
    k = primitives.load_block(k_rows, j_first, SHAPE.block_k, SHAPE.d, SHAPE.block_d, EDGE, FLAGS)
    qk = primitives.dot(q, tl.trans(k), ACC, FLAGS)  # [BLOCK_Q, BLOCK_K]
    v = primitives.load_block(v_rows, j_first, SHAPE.block_k, SHAPE.dv, SHAPE.block_dv, EDGE, FLAGS)
    s = qk
    if EDGE or (flags.SCALED & FLAGS):
        s, _, visible = primitives.scores(qk, o_q[:, None], o_k[None, :], of, EDGE, FLAGS)
        if EDGE and ((flags.MASKED | flags.WINDOWED) & FLAGS):
            used = primitives.used_keys(visible, o_k, at.first, of.band, SHAPE.block_q, FLAGS)
            v = primitives.clear_rows(v, used)
    m_new = tl.maximum(m, tl.max(s, 1))  # E2
    m_safe = m_new
    if flags.MAY_BE_EMPTY & FLAGS:
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    factor = primitives.unit_of_scores(of.scale, FLAGS) * LOG2_E
    p = tl.exp2((s - m_safe[:, None]) * factor)  # E3
    shrink = tl.exp2((m - m_safe) * factor)
    l = l * shrink + tl.sum(p, 1)  # E3
    o_acc = o_acc * shrink[:, None]  # E4
    if flags.DROPOUT & FLAGS:
        keep = primitives.dropout_keep(of.dropout, o_q, j_first, SHAPE.block_k)
        p = tl.where(keep, p, 0.0)
    o_acc += primitives.dot(p.to(v.dtype), v, ACC, FLAGS)  # E4
    return o_acc, m_new, l


@triton.jit
def _overflowed(
    empty,  # [BLOCK_Q]: rows without a sum
    o_q,
    at,
    band,
    mask,
    SHAPE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Which of the empty rows see a key after all: their scores are -inf, products that
    overflowed."""
    see = o_q * 0
    if flags.MASKED & FLAGS:
        if tl.max(empty.to(tl.int32), 0) != 0:
            p_counts, p_lists = walk.lists_of(at, mask, tl.cdiv(at.seq_k, SHAPE.block_k))
            if flags.BOOL_MASK & FLAGS:
                see += tl.load(p_counts + 1)  # blocks that every row sees
            for n in range(0, tl.load(p_counts)):
                o_k = tl.load(p_lists + n) * SHAPE.block_k + tl.arange(0, SHAPE.block_k)
                visible, _ = primitives.visible_keys(o_q[:, None], o_k[None, :], band, FLAGS)
                see += tl.max(visible.to(tl.int32), 1)
    else:
        first = tl.maximum(see, o_q - band.left)
        last = see + band.seq_k - 1
        if flags.WINDOW_RIGHT & FLAGS:
            last = tl.minimum(last, o_q + band.right)
        see = (first <= last).to(tl.int32)
    return empty & (see != 0)


@triton.jit(do_not_specialize=walk.SIZES)
def attention_forward_kernel(
    p_q,  # [B, Hq, Sq, D]
    p_k,  # [B, Hk, Sk, D]; with TMA the tensor's descriptor
    p_v,  # [B, Hk, Sk, Dv]; the same
    p_o,  # [B, Hq, Sq, Dv]
    p_lse,  # [B, Hq, Sq]
    p_max,  # its parts, laid out alike
    p_log_sum,
    strides,  # Strides
    mask,  # Mask
    extras,  # Extras
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
    SHAPE: tl.constexpr,  # Shape
    FLAGS: tl.constexpr,
):
    ACC: tl.constexpr = p_lse.dtype.element_ty
    at = walk.place_of_queries(
        extras, heads, batch_heads, group, section, tokens_q, tokens_k, seq_q, seq_k, SHAPE, FLAGS
    )
    if flags.VARLEN & FLAGS:  # noqa: SIM102 - known at compile time
        if at.first >= at.seq_q:
            return
    of = walk.weights_of(
        at, extras, mask, heads, left, right, seed_batch, threshold,
        (scale, cap_scale, cap, keep_scale), ACC, FLAGS,
    )  # fmt: skip
    BLOCK_Q: tl.constexpr = SHAPE.block_q
    o_q = at.first + tl.arange(0, BLOCK_Q)
    q_rows = primitives.query_rows(p_q, strides.q, at)
    walked = (
        primitives.walked_keys(p_k, strides.k, at, FLAGS),
        primitives.walked_keys(p_v, strides.v, at, FLAGS),
    )
    q = primitives.load_rows(q_rows, o_q, SHAPE.d, SHAPE.block_d, True, FLAGS)
    o_acc = primitives.zeros(SHAPE.block_q, SHAPE.block_dv, ACC)
    m = tl.full((BLOCK_Q,), float("-inf"), ACC)
    l = tl.zeros((BLOCK_Q,), ACC)
    o_acc, m, l = walk.walk_keys(_step, (o_acc, m, l), q, walked, at, of, mask, SHAPE, ACC, FLAGS)

    # epilogue
    empty = l == 0.0
    if flags.DROPOUT & FLAGS:
        o_acc = o_acc * of.dropout.scale
    total = tl.where(empty, 1.0, l)
    o = tl.where(empty[:, None], 0.0, o_acc / total[:, None])  # E5
    log_sum = tl.log2(total) * LN_2
    m = tl.where(log_sum == log_sum, m, log_sum)  # a NaN in all the row
    if flags.MAY_BE_EMPTY & FLAGS:  # a NaN, as a softmax of -inf alone is
        overflowed = _overflowed(empty, o_q, at, of.band, mask, SHAPE, FLAGS)
        o = tl.where(overflowed[:, None], float("nan"), o)
        m = tl.where(overflowed, float("nan"), m)
    o_rows = primitives.query_rows(p_o, strides.o, at)
    primitives.store_rows(o_rows, o_q, o, SHAPE.dv, SHAPE.block_dv, FLAGS)
    row = at.batch * strides.rows[0] + at.head * strides.rows[1] + at.start_q + o_q
    lse = m * primitives.unit_of_scores(of.scale, FLAGS) + log_sum  # E5
    tl.store(p_lse + row, lse, mask=o_q < at.seq_q)
    tl.store(p_max + row, m, mask=o_q < at.seq_q)
    tl.store(p_log_sum + row, log_sum, mask=o_q < at.seq_q)
