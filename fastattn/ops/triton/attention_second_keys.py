"""The second order's gradients of keys and values, E14.

Grid: one program for each (block of BLOCK_K keys, key head, batch). It walks the queries that see
its keys, and their tangents, in every query head of the group; its tiles are transposed,
``[BLOCK_K, BLOCK_Q]``.
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
    i_first,
    own,
    walked,
    at,
    of,
    SHAPE: tl.constexpr,
    ACC: tl.constexpr,
    EDGE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """The gradients of K and V after one block of queries: E14."""
    gk, gv = state  # [BLOCK_K, BLOCK_D], [BLOCK_K, BLOCK_DV]
    k, v, t_k, t_v = own
    q_rows, t_q_rows, do_rows, p_rows = walked
    o_q = i_first + tl.arange(0, SHAPE.block_q)
    o_k = at.first + tl.arange(0, SHAPE.block_k)
    q = primitives.load_block(q_rows, i_first, SHAPE.block_q, SHAPE.d, SHAPE.block_d, True, FLAGS)
    do = primitives.load_block(
        do_rows, i_first, SHAPE.block_q, SHAPE.dv, SHAPE.block_dv, True, FLAGS
    )
    t_q = q
    if flags.T_QUERY & FLAGS:
        t_q = primitives.load_block(
            t_q_rows, i_first, SHAPE.block_q, SHAPE.d, SHAPE.block_d, True, FLAGS
        )
    softmax, delta = load_statistics(p_rows, o_q, at.seq_q, flags.SECOND_ROW)
    mu, beta = load_second_statistics(p_rows, o_q, at.seq_q, flags.SECOND_ROW)
    if flags.MAY_BE_EMPTY & FLAGS:
        q = primitives.clear_rows(q, softmax[0] != float("inf"))
        t_q = primitives.clear_rows(t_q, softmax[0] != float("inf"))
        do = primitives.clear_rows(do, softmax[0] != float("inf"))
    # Each product is used before the next is made: four of them do not fit into the registers.
    p, tangent, x, capped, visible = weights_and_tangent(  # [BLOCK_K, BLOCK_Q]
        k, t_k, q, t_q, primitives.as_row(softmax), mu[None, :], o_q[None, :], o_k[:, None], of,
        ACC, flags.T_KEY, flags.T_QUERY, EDGE, FLAGS,
    )  # fmt: skip
    keep = True
    if flags.DROPOUT & FLAGS:
        keep = tl.trans(primitives.dropout_keep(of.dropout, o_q, at.first, SHAPE.block_k))
    keep_scale = of.dropout.scale
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
    ds, e = before_softcap(ds, e, x, capped, of.cap_scale, FLAGS)
    if flags.T_QUERY & FLAGS:
        gk += primitives.dot(ds.to(t_q.dtype), t_q, ACC, FLAGS)  # E14
    gk += primitives.dot(e.to(q.dtype), q, ACC, FLAGS)  # E14
    return gk, gv


@triton.jit(do_not_specialize=walk.SIZES_BUT_GROUP)
def attention_second_keys_kernel(
    p_q,  # [B, Hq, Sq, D]; with TMA the tensor's descriptor
    p_k,  # [B, Hk, Sk, D]
    p_v,  # [B, Hk, Sk, Dv]
    p_t_q,  # like what they are tangents of; p_t_q's descriptor with TMA
    p_t_k,
    p_t_v,
    p_do,  # [B, Hq, Sq, Dv]; with TMA the tensor's descriptor
    p_dk,
    p_dv,
    p_rows,  # [B, Hq, Sq, SECOND_ROW]
    strides,  # Strides
    mask,  # Mask
    extras,  # Extras
    heads,  # key heads
    batch_heads,
    group,
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
    at = walk.place_of_keys(
        extras, heads, batch_heads, section, tokens_q, tokens_k, seq_q, seq_k, SHAPE, FLAGS
    )
    if flags.VARLEN & FLAGS:  # noqa: SIM102 - known at compile time
        if at.first >= at.seq_k:
            return
    o_k = at.first + tl.arange(0, SHAPE.block_k)
    k_rows = primitives.key_rows(p_k, strides.k, at)
    v_rows = primitives.key_rows(p_v, strides.v, at)
    k = primitives.load_rows(k_rows, o_k, SHAPE.d, SHAPE.block_d, True, FLAGS)
    v = primitives.load_rows(v_rows, o_k, SHAPE.dv, SHAPE.block_dv, True, FLAGS)
    t_k = k
    if flags.T_KEY & FLAGS:
        t_k_rows = primitives.key_rows(p_t_k, strides.t_k, at)
        t_k = primitives.load_rows(t_k_rows, o_k, SHAPE.d, SHAPE.block_d, True, FLAGS)
    t_v = v
    if flags.T_VALUE & FLAGS:
        t_v_rows = primitives.key_rows(p_t_v, strides.t_v, at)
        t_v = primitives.load_rows(t_v_rows, o_k, SHAPE.dv, SHAPE.block_dv, True, FLAGS)
    own = (k, v, t_k, t_v)
    gk = primitives.zeros(SHAPE.block_k, SHAPE.block_d, ACC)
    gv = primitives.zeros(SHAPE.block_k, SHAPE.block_dv, ACC)
    for i_group in range(0, group):
        at_head = walk.at_head(at, at.i_hk * group + i_group)
        of = walk.weights_of(
            at_head, extras, mask, heads * group, left, right, seed_batch, threshold,
            (scale, cap_scale, cap, keep_scale), ACC, FLAGS,
        )  # fmt: skip
        q_rows = primitives.walked_queries(p_q, strides.q, at_head, FLAGS)
        t_q_rows = q_rows
        if flags.T_QUERY & FLAGS:
            t_q_rows = primitives.walked_queries(p_t_q, strides.t_q, at_head, FLAGS)
        walked = (
            q_rows,
            t_q_rows,
            primitives.walked_queries(p_do, strides.do, at_head, FLAGS),
            walk.statistics_at(p_rows, strides.rows, at_head, flags.SECOND_ROW),
        )
        gk, gv = walk.walk_queries(
            _step, (gk, gv), own, walked, at_head, of, mask, SHAPE, ACC, FLAGS
        )

    # epilogue
    gk *= primitives.scalar(scale, ACC)
    if flags.DROPOUT & FLAGS:
        gv *= primitives.scalar(keep_scale, ACC)
    dk_rows = primitives.key_rows(p_dk, strides.dk, at)
    dv_rows = primitives.key_rows(p_dv, strides.dv, at)
    primitives.store_rows(dk_rows, o_k, gk, SHAPE.d, SHAPE.block_d, FLAGS)
    primitives.store_rows(dv_rows, o_k, gv, SHAPE.dv, SHAPE.block_dv, FLAGS)
