"""The second order's gradient of queries, E14.

Grid: one program for each (block of BLOCK_Q queries, query head, batch), longest block first. It
walks its keys and their tangents as the forward does.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives, walk
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
    """The gradient of Q after one block of keys: E14."""
    gq = state  # [BLOCK_Q, BLOCK_D]
    q, t_q, do, softmax, delta, mu, beta = own
    k_rows, v_rows, t_k_rows, t_v_rows = walked
    o_q = at.first + tl.arange(0, SHAPE.block_q)
    o_k = j_first + tl.arange(0, SHAPE.block_k)
    k = primitives.load_block(k_rows, j_first, SHAPE.block_k, SHAPE.d, SHAPE.block_d, EDGE, FLAGS)
    v = primitives.load_block(v_rows, j_first, SHAPE.block_k, SHAPE.dv, SHAPE.block_dv, EDGE, FLAGS)
    t_k = k
    if flags.T_KEY & FLAGS:
        t_k = primitives.load_block(
            t_k_rows, j_first, SHAPE.block_k, SHAPE.d, SHAPE.block_d, EDGE, FLAGS
        )
    # Each product is used before the next is made: four of them do not fit into the registers.
    p, tangent, x, capped, visible = weights_and_tangent(  # [BLOCK_Q, BLOCK_K]
        q, t_q, k, t_k, primitives.as_column(softmax), mu[:, None], o_q[:, None], o_k[None, :],
        of, ACC, flags.T_QUERY, flags.T_KEY, EDGE, FLAGS,
    )  # fmt: skip
    keep = True
    if flags.DROPOUT & FLAGS:
        keep = primitives.dropout_keep(of.dropout, o_q, j_first, SHAPE.block_k)
    keep_scale = of.dropout.scale
    g = primitives.dot(do, tl.trans(v), ACC, FLAGS)
    ds = score_gradient(p, g, delta[:, None], keep, keep_scale, visible, EDGE, FLAGS)
    h = g
    if flags.T_VALUE & FLAGS:
        t_v = primitives.load_block(
            t_v_rows, j_first, SHAPE.block_k, SHAPE.dv, SHAPE.block_dv, EDGE, FLAGS
        )
        h = primitives.dot(do, tl.trans(t_v), ACC, FLAGS)
    e = second_gradient(p, ds, tangent, h, beta[:, None], keep, keep_scale, visible, EDGE, FLAGS)
    ds, e = before_softcap(ds, e, x, capped, of.cap_scale, FLAGS)
    if EDGE and ((flags.MASKED | flags.WINDOWED) & FLAGS):
        used = primitives.used_keys(visible, o_k, at.first, of.band, SHAPE.block_q, FLAGS)
        k = primitives.clear_rows(k, used)
        if flags.T_KEY & FLAGS:
            t_k = primitives.clear_rows(t_k, used)
    if flags.T_KEY & FLAGS:
        gq += primitives.dot(ds.to(t_k.dtype), t_k, ACC, FLAGS)  # E14
    gq += primitives.dot(e.to(k.dtype), k, ACC, FLAGS)  # E14
    return gq


@triton.jit(do_not_specialize=walk.SIZES)
def attention_second_queries_kernel(
    p_q,  # [B, Hq, Sq, D]
    p_k,  # [B, Hk, Sk, D]; with TMA the tensor's descriptor
    p_v,  # [B, Hk, Sk, Dv]; the same
    p_t_q,  # like what they are tangents of
    p_t_k,
    p_t_v,
    p_do,  # [B, Hq, Sq, Dv]
    p_dq,
    p_rows,  # [B, Hq, Sq, SECOND_ROW]
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
    walked = walk.keys_and_tangents(p_k, p_v, p_t_k, p_t_v, strides, at, FLAGS)
    do_rows = primitives.query_rows(p_do, strides.do, at)
    do = primitives.load_rows(do_rows, o_q, SHAPE.dv, SHAPE.block_dv, True, FLAGS)
    p_rows = walk.statistics_at(p_rows, strides.rows, at, flags.SECOND_ROW)
    softmax, delta = load_statistics(p_rows, o_q, at.seq_q, flags.SECOND_ROW)
    mu, beta = load_second_statistics(p_rows, o_q, at.seq_q, flags.SECOND_ROW)
    q, t_q = walk.query_and_tangent(p_q, p_t_q, strides, at, o_q, SHAPE, FLAGS)
    if flags.MAY_BE_EMPTY & FLAGS:
        q = primitives.clear_rows(q, softmax[0] != float("inf"))
        t_q = primitives.clear_rows(t_q, softmax[0] != float("inf"))
        do = primitives.clear_rows(do, softmax[0] != float("inf"))
    gq = primitives.zeros(SHAPE.block_q, SHAPE.block_d, ACC)
    own = (q, t_q, do, softmax, delta, mu, beta)
    gq = walk.walk_keys(_step, gq, own, walked, at, of, mask, SHAPE, ACC, FLAGS)

    # epilogue
    gq *= of.scale
    dq_rows = primitives.query_rows(p_dq, strides.dq, at)
    primitives.store_rows(dq_rows, o_q, gq, SHAPE.d, SHAPE.block_d, FLAGS)
