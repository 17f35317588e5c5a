"""What the kernels of the second order share: E12's A, and E14.

A tangent without its bit in FLAGS is absent: its operand is never loaded, its products are not
made.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives


@triton.jit
def cross(a, t_a, b, t_b, ACC: tl.constexpr, T_A: tl.constexpr, T_B: tl.constexpr, FLAGS):
    """tA Bᵀ + A tBᵀ."""
    x = tl.zeros((a.shape[0], b.shape[0]), ACC)
    if T_A & FLAGS:
        x += primitives.dot(t_a, tl.trans(b), ACC, FLAGS)
    if T_B & FLAGS:
        x += primitives.dot(a, tl.trans(t_b), ACC, FLAGS)
    return x


@triton.jit
def weights_and_tangent(
    a,  # the tile is A Bᵀ: Q and K, or K and Q where it is transposed
    t_a,
    b,
    t_b,
    softmax,  # of the rows, as load_softmax has it, shaped like i
    mu,
    i,
    j,
    of,  # Weights
    ACC: tl.constexpr,
    T_A: tl.constexpr,
    T_B: tl.constexpr,
    EDGE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """P, A - μ, tQ Kᵀ + Q tKᵀ, the softcap's tanh, what is visible: E6, E12."""
    qk = primitives.dot(a, tl.trans(b), ACC, FLAGS)
    s, capped, visible = primitives.scores(qk, i, j, of, EDGE, FLAGS)
    p = primitives.weights(s, softmax, of.scale, FLAGS)  # E6
    x = cross(a, t_a, b, t_b, ACC, T_A, T_B, FLAGS)
    if EDGE:
        x = tl.where(visible, x, 0.0)  # a hidden key's tangent may be NaN
    tangent = x * of.scale
    if flags.SOFTCAP & FLAGS:
        tangent *= 1.0 - capped * capped
    if flags.T_MASK & FLAGS:
        strides = of.t_mask_strides
        p_tile = of.p_t_mask + i.to(tl.int64) * strides[2] + j.to(tl.int64) * strides[3]
        tangent += tl.load(p_tile, mask=visible, other=0.0).to(ACC)
    return p, tangent - mu, x, capped, visible


@triton.jit
def second_gradient(
    p, ds, tangent, h, beta, keep, keep_scale, visible, EDGE: tl.constexpr, FLAGS: tl.constexpr
):
    """E of the scores after the softcap, from H = dO tVᵀ: E14."""
    e = -beta * p
    if flags.T_SCORES & FLAGS:
        e += ds * tangent
    if flags.T_VALUE & FLAGS:
        if flags.DROPOUT & FLAGS:
            h = tl.where(keep, h * keep_scale, 0.0)
        if EDGE:
            h = tl.where(visible, h, 0.0)
        e += p * h
    return e


@triton.jit
def before_softcap(ds, e, x, capped, cap_scale, FLAGS: tl.constexpr):
    """dS and E of the scores before the softcap: E14."""
    if flags.SOFTCAP & FLAGS:
        derivative = 1.0 - capped * capped
        e = derivative * (e - 2.0 * cap_scale * capped * x * ds)
        ds *= derivative
    return ds, e
