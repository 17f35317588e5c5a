"""The gradients of keys and values, E6, E7, E9, E10.

Grid: one program for each (block of BLOCK_K keys, key head, batch). It walks the queries that see
its keys, in every query head of the group, so that nothing is added by two programs; its tiles are
transposed, ``[BLOCK_K, BLOCK_Q]``.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives, walk
from fastattn.ops.triton.attention_backward import load_statistics, weights_and_gradient


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
    """dK and dV after one block of queries: E6, E7, E9, E10."""
    dk, dv = state  # [BLOCK_K, BLOCK_D], [BLOCK_K, BLOCK_DV]
    k, v = own
    q_rows, do_rows, p_rows = walked
    o_q = i_first + tl.arange(0, SHAPE.block_q)
    o_k = at.first + tl.arange(0, SHAPE.block_k)
    q = primitives.load_block(q_rows, i_first, SHAPE.block_q, SHAPE.d, SHAPE.block_d, True, FLAGS)
    do = primitives.load_block(
        do_rows, i_first, SHAPE.block_q, SHAPE.dv, SHAPE.block_dv, True, FLAGS
    )
    softmax, delta = load_statistics(p_rows, o_q, at.seq_q, flags.ROW)
    if flags.MAY_BE_EMPTY & FLAGS:
        q = primitives.clear_rows(q, softmax[0] != float("inf"))
        do = primitives.clear_rows(do, softmax[0] != float("inf"))
    qk = primitives.dot(k, tl.trans(q), ACC, FLAGS)  # [BLOCK_K, BLOCK_Q]
    keep = True
    if flags.DROPOUT & FLAGS:
        keep = tl.trans(primitives.dropout_keep(of.dropout, o_q, at.first, SHAPE.block_k))
    p, ds, capped, _ = weights_and_gradient(
        qk, v, do, primitives.as_row(softmax), delta[None, :], keep, o_q[None, :], o_k[:, None],
        of, ACC, EDGE, FLAGS,
    )  # fmt: skip
    if flags.DROPOUT & FLAGS:
        p = tl.where(keep, p, 0.0)
    dv += primitives.dot(p.to(do.dtype), do, ACC, FLAGS)  # E10
    if flags.SOFTCAP & FLAGS:
        ds *= 1.0 - capped * capped
    dk += primitives.dot(ds.to(q.dtype), q, ACC, FLAGS)  # E9
    return dk, dv


@triton.jit(do_not_specialize=walk.SIZES_BUT_GROUP)
def attention_backward_keys_kernel(
    p_q,  # [B, Hq, Sq, D]; with TMA the tensor's descriptor
    p_k,  # [B, Hk, Sk, D]
    p_v,  # [B, Hk, Sk, Dv]
    p_do,  # [B, Hq, Sq, Dv]; with TMA the tensor's descriptor
    p_dk,
    p_dv,
    p_rows,  # [B, Hq, Sq, ROW]
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
    dk = primitives.zeros(SHAPE.block_k, SHAPE.block_d, ACC)
    dv = primitives.zeros(SHAPE.block_k, SHAPE.block_dv, ACC)
    for i_group in range(0, group):
        at_head = walk.at_head(at, at.i_hk * group + i_group)
        of = walk.weights_of(
            at_head, extras, mask, heads * group, left, right, seed_batch, threshold,
            (scale, cap_scale, cap, keep_scale), ACC, FLAGS,
        )  # fmt: skip
        walked = (
            primitives.walked_queries(p_q, strides.q, at_head, FLAGS),
            primitives.walked_queries(p_do, strides.do, at_head, FLAGS),
            walk.statistics_at(p_rows, strides.rows, at_head, flags.ROW),
        )
        dk, dv = walk.walk_queries(
            _step, (dk, dv), (k, v), walked, at_head, of, mask, SHAPE, ACC, FLAGS
        )

    # epilogue
    dk *= primitives.scalar(scale, ACC)
    if flags.DROPOUT & FLAGS:
        dv *= primitives.scalar(keep_scale, ACC)
    dk_rows = primitives.key_rows(p_dk, strides.dk, at)
    dv_rows = primitives.key_rows(p_dv, strides.dv, at)
    primitives.store_rows(dk_rows, o_k, dk, SHAPE.d, SHAPE.block_d, FLAGS)
    primitives.store_rows(dv_rows, o_k, dv, SHAPE.dv, SHAPE.block_dv, FLAGS)
