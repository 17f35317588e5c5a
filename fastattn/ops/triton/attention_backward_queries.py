"""The gradient of queries, E6-E8.

Grid: one program for each (block of BLOCK_Q queries, query head, batch), longest block first. It
walks its keys as the forward does.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives, walk
from fastattn.ops.triton.attention_backward import load_statistics, weights_and_gradient


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
    """dQ after one block of keys: E6-E8."""
    dq = state  # [BLOCK_Q, BLOCK_D]
    q, do, softmax, delta = own
    k_rows, v_rows = walked
    o_q = at.first + tl.arange(0, SHAPE.block_q)
    o_k = j_first + tl.arange(0, SHAPE.block_k)
    k = primitives.load_block(k_rows, j_first, SHAPE.block_k, SHAPE.d, SHAPE.block_d, EDGE, FLAGS)
    v = primitives.load_block(v_rows, j_first, SHAPE.block_k, SHAPE.dv, SHAPE.block_dv, EDGE, FLAGS)
    qk = primitives.dot(q, tl.trans(k), ACC, FLAGS)  # [BLOCK_Q, BLOCK_K]
    keep = True
    if flags.DROPOUT & FLAGS:
        keep = primitives.dropout_keep(of.dropout, o_q, j_first, SHAPE.block_k)
    _, ds, capped, visible = weights_and_gradient(
        qk, do, v, primitives.as_column(softmax), delta[:, None], keep, o_q[:, None],
        o_k[None, :], of, ACC, EDGE, FLAGS,
    )  # fmt: skip
    if flags.SOFTCAP & FLAGS:
        ds *= 1.0 - capped * capped
    if EDGE and ((flags.MASKED | flags.WINDOWED) & FLAGS):
        used = primitives.used_keys(visible, o_k, at.first, of.band, SHAPE.block_q, FLAGS)
        k = primitives.clear_rows(k, used)
    dq += primitives.dot(ds.to(k.dtype), k, ACC, FLAGS)  # E8
    return dq


@triton.jit(do_not_specialize=walk.SIZES)
def attention_backward_queries_kernel(
    p_q,  # [B, Hq, Sq, D]
    p_k,  # [B, Hk, Sk, D]; with TMA the tensor's descriptor
    p_v,  # [B, Hk, Sk, Dv]; the same
    p_do,  # [B, Hq, Sq, Dv]
    p_dq,
    p_rows,  # [B, Hq, Sq, ROW]
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
    ACC: tl.constexpr = p_rows.dtype.element_ty
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
    o_q = at.first + tl.arange(0, SHAPE.block_q)
    q_rows = primitives.query_rows(p_q, strides.q, at)
    do_rows = primitives.query_rows(p_do, strides.do, at)
    walked = (
        primitives.walked_keys(p_k, strides.k, at, FLAGS),
        primitives.walked_keys(p_v, strides.v, at, FLAGS),
    )
    q = primitives.load_rows(q_rows, o_q, SHAPE.d, SHAPE.block_d, True, FLAGS)
    do = primitives.load_rows(do_rows, o_q, SHAPE.dv, SHAPE.block_dv, True, FLAGS)
    p_rows = walk.statistics_at(p_rows, strides.rows, at, flags.ROW)
    softmax, delta = load_statistics(p_rows, o_q, at.seq_q, flags.ROW)
    if flags.MAY_BE_EMPTY & FLAGS:
        q = primitives.clear_rows(q, softmax[0] != float("inf"))
        do = primitives.clear_rows(do, softmax[0] != float("inf"))
    dq = primitives.zeros(SHAPE.block_q, SHAPE.block_d, ACC)
    own = (q, do, softmax, delta)
    dq = walk.walk_keys(_step, dq, own, walked, at, of, mask, SHAPE, ACC, FLAGS)

    # epilogue
    dq *= of.scale
    dq_rows = primitives.query_rows(p_dq, strides.dq, at)
    primitives.store_rows(dq_rows, o_q, dq, SHAPE.d, SHAPE.block_d, FLAGS)
