"""What the attention backward kernels share, E6 and E7, and Δ. None of them adds atomically: Δ,
then dK and dV by keys, then dQ by queries, which computes the scores a second time."""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives
from fastattn.ops.triton.primitives import LOG2_E


@triton.jit
def load_softmax(p_max, p_log_sum, o_q, seq_q):
    """The maximum of a row's scores, and the logarithm in base 2 of the sum of its powers. An empty
    row's maximum becomes +inf, which makes its weights 0; so do rows beyond seq_q."""
    most = tl.load(p_max + o_q, mask=o_q < seq_q, other=float("inf"))
    log_sum = tl.load(p_log_sum + o_q, mask=o_q < seq_q, other=0.0)
    return tl.where(most == float("-inf"), float("inf"), most), log_sum * LOG2_E


@triton.jit
def load_statistics(p_rows, o_q, seq_q, WIDTH: tl.constexpr):
    """load_softmax's pair, and Δ. What is known of a row lies side by side, because there are no
    registers for more pointers."""
    p_rows += o_q * WIDTH
    most = tl.load(p_rows, mask=o_q < seq_q, other=float("inf"))
    log_sum = tl.load(p_rows + 1, mask=o_q < seq_q, other=0.0)
    delta = tl.load(p_rows + 2, mask=o_q < seq_q, other=0.0)
    return (most, log_sum), delta


@triton.jit
def load_second_statistics(p_rows, o_q, seq_q, WIDTH: tl.constexpr):
    """μ and β."""
    p_rows += o_q * WIDTH
    mu = tl.load(p_rows + 3, mask=o_q < seq_q, other=0.0)
    beta = tl.load(p_rows + 4, mask=o_q < seq_q, other=0.0)
    return mu, beta


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
    a,  # dP is A Bᵀ: dO and V, or V and dO where it is transposed
    b,
    softmax,  # of the rows, as load_softmax has it, shaped like i
    delta,
    keep,
    i,
    j,
    of,  # Weights
    ACC: tl.constexpr,
    EDGE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """P, dS before the softcap, the softcap's tanh, what is visible: E6, E7."""
    s, capped, visible = primitives.scores(qk, i, j, of, EDGE, FLAGS)
    p = primitives.weights(s, softmax, of.scale, FLAGS)  # E6
    dp = primitives.dot(a, tl.trans(b), ACC, FLAGS)  # behind P: both fit into the registers then
    ds = score_gradient(p, dp, delta, keep, of.dropout.scale, visible, EDGE, FLAGS)
    return p, ds, capped, visible


@triton.jit(do_not_specialize=["heads", "seq_q"])
def attention_delta_kernel(
    p_o,
    p_do,
    p_max,  # [B, Hq, Sq], as what follows
    p_log_sum,
    p_mu,  # of the second order
    p_grad_lse,
    p_rows,  # [B, Hq, Sq, WIDTH]
    o_strides,
    do_strides,
    max_strides,  # of batch, head; of μ too
    grad_lse_strides,  # of batch, head, row
    row_strides,  # of batch, head
    heads,
    seq_q,
    WIDTH: tl.constexpr,
    BETA: tl.constexpr,  # o is the output's tangent, and μ and β are what is left
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    FLAGS: tl.constexpr,
):
    ACC: tl.constexpr = p_rows.dtype.element_ty
    blocks = tl.cdiv(seq_q, BLOCK_Q)
    i_bh = tl.program_id(0) // blocks
    i_b64, i_h64 = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_q = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_q = o_q < seq_q
    o_rows = primitives.rows_of(p_o, o_strides, i_b64, i_h64, 0, seq_q)
    do_rows = primitives.rows_of(p_do, do_strides, i_b64, i_h64, 0, seq_q)
    o = primitives.load_rows(o_rows, o_q, HEAD_DIM_V, BLOCK_DV, True, FLAGS)
    do = primitives.load_rows(do_rows, o_q, HEAD_DIM_V, BLOCK_DV, True, FLAGS)
    product = tl.sum(o.to(ACC) * do.to(ACC), 1)  # E6, E14
    if flags.LSE_GRADIENT & FLAGS:
        p_grad_lse += i_b64 * grad_lse_strides[0] + i_h64 * grad_lse_strides[1]
        product -= tl.load(p_grad_lse + o_q * grad_lse_strides[2], mask=m_q, other=0.0)  # E6
    row = i_b64 * max_strides[0] + i_h64 * max_strides[1]
    most, log_sum = load_softmax(p_max + row, p_log_sum + row, o_q, seq_q)
    product = tl.where(most == float("inf"), 0.0, product)
    p_rows += i_b64 * row_strides[0] + i_h64 * row_strides[1] + o_q * WIDTH
    if BETA:
        tl.store(p_rows + 3, tl.load(p_mu + row + o_q, mask=m_q), mask=m_q)
        tl.store(p_rows + 4, product, mask=m_q)
    else:
        tl.store(p_rows, most, mask=m_q)
        tl.store(p_rows + 1, log_sum, mask=m_q)
        tl.store(p_rows + 2, product, mask=m_q)
