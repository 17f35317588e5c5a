"""The forward mode, E12, from the forward's output and LSE.

Grid: one program for each (block of BLOCK_Q queries, query head, batch), longest block first. It
owns its rows of tO and tLSE = μ, and walks its keys as the forward does; with the LSE known there
is no running maximum.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives, walk
from fastattn.ops.triton.attention_backward import load_softmax
from fastattn.ops.triton.attention_tangent import weights_and_tangent


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
    """tO before -μO, and μ, after one block of keys: E12."""
    t_acc, mu = state  # [BLOCK_Q, BLOCK_DV], [BLOCK_Q]
    q, t_q, softmax = own
    k_rows, v_rows, t_k_rows, t_v_rows = walked
    o_q = at.first + tl.arange(0, SHAPE.block_q)
    o_k = j_first + tl.arange(0, SHAPE.block_k)
    k = primitives.load_block(k_rows, j_first, SHAPE.block_k, SHAPE.d, SHAPE.block_d, EDGE, FLAGS)
    t_k = k
    if flags.T_KEY & FLAGS:
        t_k = primitives.load_block(
            t_k_rows, j_first, SHAPE.block_k, SHAPE.d, SHAPE.block_d, EDGE, FLAGS
        )
    p, a, _, _, visible = weights_and_tangent(  # [BLOCK_Q, BLOCK_K]
        q, t_q, k, t_k, primitives.as_column(softmax), 0.0, o_q[:, None], o_k[None, :], of, ACC,
        flags.T_QUERY, flags.T_KEY, EDGE, FLAGS,
    )  # fmt: skip
    used = o_k < at.seq_k
    if EDGE and ((flags.MASKED | flags.WINDOWED) & FLAGS):
        used = primitives.used_keys(visible, o_k, at.first, of.band, SHAPE.block_q, FLAGS)
    keep = True
    if flags.DROPOUT & FLAGS:
        keep = primitives.dropout_keep(of.dropout, o_q, j_first, SHAPE.block_k)
    if flags.T_SCORES & FLAGS:
        pa = p * a
        mu += tl.sum(pa, 1)  # E12
        if flags.DROPOUT & FLAGS:
            pa = tl.where(keep, pa, 0.0)
        v = primitives.load_block(
            v_rows, j_first, SHAPE.block_k, SHAPE.dv, SHAPE.block_dv, EDGE, FLAGS
        )
        if EDGE and ((flags.MASKED | flags.WINDOWED) & FLAGS):
            v = primitives.clear_rows(v, used)
        t_acc += primitives.dot(pa.to(v.dtype), v, ACC, FLAGS)  # E12
    if flags.T_VALUE & FLAGS:
        if flags.DROPOUT & FLAGS:
            p = tl.where(keep, p, 0.0)
        t_v = primitives.load_block(
            t_v_rows, j_first, SHAPE.block_k, SHAPE.dv, SHAPE.block_dv, EDGE, FLAGS
        )
        if EDGE and ((flags.MASKED | flags.WINDOWED) & FLAGS):
            t_v = primitives.clear_rows(t_v, used)
        t_acc += primitives.dot(p.to(t_v.dtype), t_v, ACC, FLAGS)  # E12
    return t_acc, mu


@triton.jit(do_not_specialize=walk.SIZES)
def attention_jvp_kernel(
    p_q,  # [B, Hq, Sq, D]
    p_k,  # [B, Hk, Sk, D]; with TMA the tensor's descriptor
    p_v,  # [B, Hk, Sk, Dv]; the same
    p_t_q,  # like what they are tangents of
    p_t_k,
    p_t_v,
    p_o,  # [B, Hq, Sq, Dv]
    p_t_o,  # [B, Hq, Sq, Dv]
    p_max,  # [B, Hq, Sq]: of the forward's softmax, as p_log_sum
    p_log_sum,
    p_mu,  # [B, Hq, Sq]
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
    ACC: tl.constexpr = p_max.dtype.element_ty
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
    row = at.batch * strides.rows[0] + at.head * strides.rows[1] + at.start_q
    walked = walk.keys_and_tangents(p_k, p_v, p_t_k, p_t_v, strides, at, FLAGS)
    q, t_q = walk.query_and_tangent(p_q, p_t_q, strides, at, o_q, SHAPE, FLAGS)
    softmax = load_softmax(p_max + row, p_log_sum + row, o_q, at.seq_q)
    if flags.MAY_BE_EMPTY & FLAGS:
        q = primitives.clear_rows(q, softmax[0] != float("inf"))
        t_q = primitives.clear_rows(t_q, softmax[0] != float("inf"))
    t_acc = primitives.zeros(SHAPE.block_q, SHAPE.block_dv, ACC)
    mu = tl.zeros((BLOCK_Q,), ACC)
    own = (q, t_q, softmax)
    t_acc, mu = walk.walk_keys(_step, (t_acc, mu), own, walked, at, of, mask, SHAPE, ACC, FLAGS)

    # epilogue
    if flags.DROPOUT & FLAGS:
        t_acc *= of.dropout.scale
    if flags.T_SCORES & FLAGS:
        o_rows = primitives.query_rows(p_o, strides.o, at)
        o = primitives.load_rows(o_rows, o_q, SHAPE.dv, SHAPE.block_dv, True, FLAGS)
        t_acc -= mu[:, None] * o.to(ACC)  # E12
    t_o_rows = primitives.query_rows(p_t_o, strides.t_o, at)
    primitives.store_rows(t_o_rows, o_q, t_acc, SHAPE.dv, SHAPE.block_dv, FLAGS)
    tl.store(p_mu + row + o_q, mu, mask=o_q < at.seq_q)
