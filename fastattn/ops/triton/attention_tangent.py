"""What the kernels of the second order share: E12's A, and E14.

A tangent without its bit in FLAGS is absent: its operand is never loaded, its products are not
made. Scores and their tangents are natural here, whatever unit the exponents have.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import primitives
from fastattn.ops.triton.attention_backward import weights_and_gradient
from fastattn.ops.triton.primitives import DROPOUT, SOFTCAP, T_MASK, T_SCORES, T_VALUE


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
def tangent_scores(
    x,
    capped,
    visible,
    i,
    j,
    raw_scale,
    p_t_mask,
    t_mask_strides,
    EDGE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """From x = tQ Kᵀ + Q tKᵀ: A, E12, and x; both are 0 where hidden: a hidden key's tangent may be
    NaN."""
    if EDGE:
        x = tl.where(visible, x, 0.0)
    a = x * raw_scale
    if SOFTCAP & FLAGS:
        a *= 1.0 - capped * capped
    if T_MASK & FLAGS:
        p_tile = p_t_mask + i.to(tl.int64) * t_mask_strides[2] + j.to(tl.int64) * t_mask_strides[3]
        a += tl.load(p_tile, mask=visible, other=0.0).to(x.dtype)
    return a, x


@triton.jit
def second_order(
    qk,
    x,  # tQ Kᵀ + Q tKᵀ
    g,  # dO Vᵀ
    h,  # dO tVᵀ
    lse,  # of the rows, shaped like i
    delta,
    mu,
    beta,
    keep,
    i,
    j,
    seq_q,
    seq_k,
    left,
    right,
    scale,
    raw_scale,
    cap_scale,
    cap,
    slope,
    keep_scale,
    p_mask,
    p_t_mask,
    mask_strides,
    t_mask_strides,
    EDGE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """P (A - μ), dS and E of Q Kᵀ, E of the mask, and what is visible: E14."""
    p, ds, capped, visible = weights_and_gradient(
        qk,
        g,
        lse,
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
        EDGE,
        FLAGS,
    )
    e = -beta * p
    if T_VALUE & FLAGS:
        if DROPOUT & FLAGS:
            h = tl.where(keep, h * keep_scale, 0.0)
        if EDGE:
            h = tl.where(visible, h, 0.0)
        e += p * h  # E14
    w = tl.zeros_like(p)
    e_mask = e
    if T_SCORES & FLAGS:
        a, x = tangent_scores(
            x, capped, visible, i, j, raw_scale, p_t_mask, t_mask_strides, EDGE, FLAGS
        )
        a -= mu
        w = p * a
        e += ds * a  # E14
        e_mask = e
        if SOFTCAP & FLAGS:
            e -= (2.0 * cap_scale) * capped * x * ds  # E14
    if SOFTCAP & FLAGS:
        derivative = 1.0 - capped * capped
        e *= derivative
        ds *= derivative
    return w, ds, e, e_mask, visible
