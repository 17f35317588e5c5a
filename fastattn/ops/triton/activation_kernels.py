"""An activation and dropout, and their gradient, E21 and E22 without the product."""

import triton
import triton.language as tl

from fastattn.ops.triton import tuples
from fastattn.ops.triton.linear_kernels import load_tile
from fastattn.ops.triton.norm_kernels import keep_factor, store_tile
from fastattn.ops.triton.primitives import LOG2_E

# fastattn.ops.ACTIVATIONS' places.
RELU, GELU, GELU_TANH = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SILU, RELU2, QUICK_GELU = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)


@triton.jit
def times_logistic(z, v, slope):
    """z S(v) and its derivative; S is the logistic function, ``slope`` the derivative of v."""
    power = tl.exp2(-tl.abs(v) * LOG2_E)
    inverse = 1.0 / (1.0 + power)
    logistic = tl.where(v < 0, power, 1.0) * inverse
    return z * logistic, logistic + z * (power * inverse * inverse * slope)


@triton.jit
def activate(z, KIND: tl.constexpr):
    """f(z) and f'(z)."""
    one = tl.full(z.shape, 1.0, z.dtype)
    if KIND == RELU:
        value, slope = tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, one)
    elif KIND == RELU2:
        positive = tl.where(z <= 0, 0.0, z)
        value, slope = positive * positive, positive + positive
    elif KIND == GELU:
        phi = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        value, slope = z * phi, phi + z * tl.exp2(z * z * (-0.5 * LOG2_E)) * 0.3989422804014327
    elif KIND == GELU_TANH:
        square = z * z
        v = z * (1.5957691216057308 + 0.07135481627260025 * square)  # (1 + tanh u) / 2 = S(2 u)
        # Where the square is infinite, the logistic function's slope is 0.
        slope = 1.5957691216057308 + 0.21406444881780075 * tl.minimum(square, 1e30)
        value, slope = times_logistic(z, v, slope)
    elif KIND == SILU:
        value, slope = times_logistic(z, z, one)
    elif KIND == QUICK_GELU:
        value, slope = times_logistic(z, z * 1.702, one * 1.702)
    else:
        value, slope = z, one
    return value, slope


@triton.jit(do_not_specialize=["m", "seed_rows", "threshold"])
def activation_kernel(
    p_x,  # [M, N]
    p_dy,  # [M, N]; None: the forward
    p_seed,
    p_y,  # [M, N], contiguous
    stride_x,
    stride_dy,
    m,
    n,
    seed_rows,  # rows that share a seed
    threshold,
    keep_scale: "fp64",
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid, tiles = tl.program_id(0), tl.cdiv(n, BLOCK_N)  # tiles side by side
    o_m = (pid // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = pid % tiles * BLOCK_N
    o_n = first + tl.arange(0, BLOCK_N)
    x = load_tile(p_x, o_m, o_n, stride_x, 1, m, n).to(ACC)
    value, slope = activate(x, KIND)  # E21, E22
    if p_dy is not None:
        value = load_tile(p_dy, o_m, o_n, stride_dy, 1, m, n).to(ACC) * slope  # E22
    if p_seed is not None:
        seeds = tuples.Seeds(p_seed, seed_rows, threshold, keep_scale)
        value *= keep_factor(seeds, o_m, first, m, ACC, BLOCK_N)
    store_tile(p_y, o_m, o_n, value, m, n)
