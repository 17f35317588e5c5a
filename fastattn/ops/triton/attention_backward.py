"""What the attention backward kernels share, E6 and E7, and Δ. None of them adds atomically: Δ,
then dK and dV by keys, then dQ by queries, which computes the scores a second time."""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives
from fastattn.ops.triton.primitives import LOG2_E


@triton.jit
def load_lse(p_lse, o_q, seq_q, FLAGS: tl.constexpr):
    """LSE in the units of the scores. An empty row's becomes +inf, which makes its weights 0; so
    do rows beyond seq_q."""
    lse = tl.load(p_lse + o_q, mask=o_q < seq_q, other=float("inf"))
    if flags.MAY_BE_EMPTY & FLAGS:
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
    if not (flags.FLOAT_MASK & FLAGS):
        lse *= LOG2_E
    return lse


@triton.jit
def load_statistics(p_lse, p_delta, o_q, seq_q, FLAGS: tl.constexpr):
    """load_lse's LSE and Δ."""
    delta = tl.load(p_delta + o_q, mask=o_q < seq_q, other=0.0)
    return load_lse(p_lse, o_q, seq_q, FLAGS), delta


@triton.jit
def score_gradient(
    p, dp, delta, keep, keep_scale, visible, EDGE: tl.constexpr, FLAGS: tl.constexpr
):
    """dS before the softcap: E7."""
    if flags.DROPOUT & FLAGS:
        dp = tl.where(keep, dp * keep_scale, 0.0)  # E7
    ds = p * (dp - delta)  # E7
    if EDGE:
        ds = tl.where(visible, ds, 0.0)  # a hidden key's dP may be NaN
    return ds


@triton.jit
def weights_and_gradient(
    qk,
    dp,  # dO Vᵀ
    lse,  # of the rows, shaped like i
    delta,
    keep,
    i,
    j,
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
    EDGE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """P, dS before the softcap, the softcap's tanh, what is visible: E6, E7."""
    s, capped, visible = primitives.scores(
        qk,
        i,
        j,
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
    p = primitives.power(s - lse, FLAGS)  # E6
    ds = score_gradient(p, dp, delta, keep, keep_scale, visible, EDGE, FLAGS)
    return p, ds, capped, visible


@triton.jit(do_not_specialize=["heads", "seq_q"])
def attention_delta_kernel(
    p_o,
    p_do,
    p_lse,
    p_grad_lse,
    p_delta,  # [B, Hq, Sq]
    o_strides,
    do_strides,
    lse_strides,
    grad_lse_strides,  # of batch, head, row
    delta_strides,
    heads,
    seq_q,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    FLAGS: tl.constexpr,
):
    ACC: tl.constexpr = p_delta.dtype.element_ty
    blocks = tl.cdiv(seq_q, BLOCK_Q)
    i_bh = tl.program_id(0) // blocks
    i_b64, i_h64 = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_q = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_q = o_q < seq_q
    p_o += i_b64 * o_strides[0] + i_h64 * o_strides[1]
    p_do += i_b64 * do_strides[0] + i_h64 * do_strides[1]
    o = primitives.load_rows(p_o, o_q, o_strides[2], seq_q, HEAD_DIM_V, BLOCK_DV, True, FLAGS)
    do = primitives.load_rows(p_do, o_q, do_strides[2], seq_q, HEAD_DIM_V, BLOCK_DV, True, FLAGS)
    delta = tl.sum(o.to(ACC) * do.to(ACC), 1)  # E6
    if flags.LSE_GRADIENT & FLAGS:
        p_grad_lse += i_b64 * grad_lse_strides[0] + i_h64 * grad_lse_strides[1]
        delta -= tl.load(p_grad_lse + o_q * grad_lse_strides[2], mask=m_q, other=0.0)  # E6
    p_lse += i_b64 * lse_strides[0] + i_h64 * lse_strides[1]
    lse = tl.load(p_lse + o_q, mask=m_q, other=0.0)
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(p_delta + i_b64 * delta_strides[0] + i_h64 * delta_strides[1] + o_q, delta, mask=m_q)
