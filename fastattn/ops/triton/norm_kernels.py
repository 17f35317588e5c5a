"""Dropout, the residual sum and the norm after it, E18 and E19. RMSNorm's mean is None.

The rounding of a row's sum moves a mean far from 0. The mean of the elements' distances from that
mean corrects it; the result is as exact as its dtype can hold.

1. ``norm_forward_kernel``: a program owns a block of whole rows, which stays in registers.
2. ``norm_forward_wide_kernel``: a program owns a row that no block holds, and reads it four times.
3. ``norm_backward_kernel``: a program walks its share of the rows; the column sums of the share
   stay in registers. Of rows that no block holds it takes the column sums alone.
4. ``norm_backward_wide_kernel``: a program owns a row that no block holds, and reads it twice.
5. ``norm_add_shares_kernel``: the sums over all shares, always in the same order.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import tuples
from fastattn.ops.triton.linear_kernels import load_tile
from fastattn.ops.triton.primitives import dropout_keep, scalar


@triton.jit
def divide(a, b):
    """a / b, correctly rounded; Triton's own float32 division is not."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def mean_of(x, n):
    """The mean of each row of n elements, ``[R, 1]``; x is 0 beyond them."""
    total = tl.sum(x, 1)[:, None]
    return divide(total, tl.full(total.shape, n, x.dtype))


@triton.jit
def off_mean(z, mean, o_n, n):
    """z - mean, 0 beyond n."""
    return tl.where((o_n < n)[None, :], z - mean, 0.0)


@triton.jit
def reciprocal_deviation(squares, n, eps):
    """σ⁻¹ of each row, ``[R, 1]``, from the squares of its elements' distances from the mean."""
    variance = mean_of(squares, n) + scalar(eps, squares.dtype)
    one = tl.full(variance.shape, 1.0, variance.dtype)
    if variance.dtype == tl.float32:
        return tl.div_rn(one, tl.sqrt_rn(variance))
    else:
        return one / tl.sqrt(variance)


@triton.jit
def keep_factor(seeds, o_m, first, m, ACC: tl.constexpr, BLOCK_N: tl.constexpr):
    """Z, ``[R, BLOCK_N]``: word column % 4 of Philox at (column / 4, low and high word of the row's
    number among those of its seed, 0)."""
    seed = tl.load(seeds.p + o_m // seeds.rows, mask=o_m < m, other=0)
    number = o_m % seeds.rows
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    dropout = tuples.Dropout(seed[:, None], 0, high[:, None], seeds.threshold, seeds.scale)
    keep = dropout_keep(dropout, low, first, BLOCK_N)
    return tl.where(keep, scalar(seeds.scale, ACC), 0.0)


@triton.jit
def load_sum(
    p_x, p_residual, seeds, o_m, first, stride_x, stride_residual, m, n,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z in its own dtype, ``[R, BLOCK_N]`` from the column first on; zeros beyond m and n."""
    o_n = first + tl.arange(0, BLOCK_N)
    z = load_tile(p_x, o_m, o_n, stride_x, 1, m, n).to(ACC)
    if seeds.p is not None:
        # A dropped NaN stays one, as in torch's dropout.
        z *= keep_factor(seeds, o_m, first, m, ACC, BLOCK_N)  # E18
    if p_residual is not None:
        z += load_tile(p_residual, o_m, o_n, stride_residual, 1, m, n).to(ACC)  # E18
    return z.to(p_x.dtype.element_ty)


@triton.jit
def load_normal(p_z, p_mean, p_rstd, o_m, o_n, stride_z, m, n, ACC: tl.constexpr):
    """ẑ ``[R, columns]`` and σ⁻¹ ``[R, 1]``, zeros beyond m and n."""
    z = load_tile(p_z, o_m, o_n, stride_z, 1, m, n).to(ACC)
    rstd = tl.load(p_rstd + o_m, mask=o_m < m, other=0.0)[:, None]
    if p_mean is not None:
        mean = tl.load(p_mean + o_m, mask=o_m < m, other=0.0)[:, None]
        z = off_mean(z, mean, o_n, n)
    return z * rstd, rstd


@triton.jit
def load_vector(p_x, o_n, n, ACC: tl.constexpr):
    """``[1, columns]``, zeros beyond n."""
    return tl.load(p_x + o_n, mask=o_n < n, other=0.0).to(ACC)[None, :]


@triton.jit
def store_tile(p_x, o_m, o_n, tile, m, n):
    """The inverse of load_tile, of a contiguous ``[M, N]``; nothing where p_x is None."""
    if p_x is not None:
        p_tile = p_x + o_m.to(tl.int64)[:, None] * n + o_n[None, :]
        mask = (o_m < m)[:, None] & (o_n < n)[None, :]
        tl.store(p_tile, tile.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def store_normal(p_out, p_weight, p_bias, o_m, o_n, normal, m, n, ACC: tl.constexpr):
    """y of ẑ."""
    if p_weight is not None:
        normal *= load_vector(p_weight, o_n, n, ACC)  # E18
    if p_bias is not None:
        normal += load_vector(p_bias, o_n, n, ACC)  # E18
    store_tile(p_out, o_m, o_n, normal, m, n)


@triton.jit(do_not_specialize=["m", "seed_rows", "threshold"])
def norm_forward_kernel(
    p_x,  # [M, N]
    p_residual,  # [M, N]
    p_weight,  # [N]
    p_bias,  # [N]
    p_seed,
    p_out,  # [M, N], contiguous
    p_sum,  # [M, N], contiguous
    p_mean,  # [M]
    p_rstd,  # [M]
    stride_x,
    stride_residual,
    m,
    n,
    seed_rows,  # rows that share a seed
    threshold,
    keep_scale: "fp64",
    eps: "fp64",
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # n or more
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    seeds = tuples.Seeds(p_seed, seed_rows, threshold, keep_scale)
    o_n = tl.arange(0, BLOCK_N)
    rounded = load_sum(
        p_x, p_residual, seeds, o_m, 0, stride_x, stride_residual, m, n, ACC, BLOCK_N
    )  # fmt: skip
    store_tile(p_sum, o_m, o_n, rounded, m, n)
    z = rounded.to(ACC)
    if p_mean is not None:
        mean = mean_of(z, n)  # E18
        mean += mean_of(off_mean(z, mean, o_n, n), n)
        tl.store(p_mean + o_m[:, None], mean, mask=(o_m < m)[:, None])
        z = off_mean(z, mean, o_n, n)
    rstd = reciprocal_deviation(z * z, n, eps)  # E18
    tl.store(p_rstd + o_m[:, None], rstd, mask=(o_m < m)[:, None])
    store_normal(p_out, p_weight, p_bias, o_m, o_n, z * rstd, m, n, ACC)


@triton.jit(do_not_specialize=["m", "seed_rows", "threshold"])
def norm_forward_wide_kernel(
    p_x,  # [M, N]
    p_residual,  # [M, N]
    p_weight,  # [N]
    p_bias,  # [N]
    p_seed,
    p_out,  # [M, N], contiguous
    p_sum,  # [M, N], contiguous
    p_mean,  # [M]
    p_rstd,  # [M]
    stride_x,
    stride_residual,
    m,
    n,
    seed_rows,  # rows that share a seed
    threshold,
    keep_scale: "fp64",
    eps: "fp64",
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    seeds = tuples.Seeds(p_seed, seed_rows, threshold, keep_scale)
    mean = tl.zeros((BLOCK_M, 1), ACC)
    if p_mean is not None:
        for _ in tl.static_range(2):
            total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            for first in range(0, n, BLOCK_N):
                o_n = first + tl.arange(0, BLOCK_N)
                z = load_sum(
                    p_x, p_residual, seeds, o_m, first, stride_x, stride_residual, m, n,
                    ACC, BLOCK_N,
                ).to(ACC)  # fmt: skip
                total += off_mean(z, mean, o_n, n)
            mean += mean_of(total, n)  # E18
        tl.store(p_mean + o_m[:, None], mean, mask=(o_m < m)[:, None])
    squares = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(0, n, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        z = load_sum(
            p_x, p_residual, seeds, o_m, first, stride_x, stride_residual, m, n, ACC, BLOCK_N
        ).to(ACC)  # fmt: skip
        z = off_mean(z, mean, o_n, n)
        squares += z * z
    rstd = reciprocal_deviation(squares, n, eps)  # E18
    tl.store(p_rstd + o_m[:, None], rstd, mask=(o_m < m)[:, None])
    for first in range(0, n, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        rounded = load_sum(
            p_x, p_residual, seeds, o_m, first, stride_x, stride_residual, m, n, ACC, BLOCK_N
        )  # fmt: skip
        store_tile(p_sum, o_m, o_n, rounded, m, n)
        normal = (rounded.to(ACC) - mean) * rstd
        store_normal(p_out, p_weight, p_bias, o_m, o_n, normal, m, n, ACC)


@triton.jit
def weighted(dy, p_weight, o_n, n, ACC: tl.constexpr):
    """g = w∘dy."""
    if p_weight is not None:
        dy *= load_vector(p_weight, o_n, n, ACC)  # E19
    return dy


@triton.jit
def store_gradients(
    p_dx, p_dr, p_dsum, seeds, dz, o_m, first, stride_dsum, m, n,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dr and dx from the norm's part of dz."""
    o_n = first + tl.arange(0, BLOCK_N)
    if p_dsum is not None:
        dz += load_tile(p_dsum, o_m, o_n, stride_dsum, 1, m, n).to(ACC)  # E19
    store_tile(p_dr, o_m, o_n, dz, m, n)
    if p_dx is not None:
        if seeds.p is not None:
            dz *= keep_factor(seeds, o_m, first, m, ACC, BLOCK_N)  # E19
        store_tile(p_dx, o_m, o_n, dz, m, n)


@triton.jit(do_not_specialize=["m", "share", "seed_rows", "threshold"])
def norm_backward_kernel(
    p_dy,  # [M, N]
    p_dsum,  # [M, N]
    p_z,  # [M, N]
    p_weight,  # [N]
    p_mean,  # [M]
    p_rstd,  # [M]
    p_seed,
    p_dx,  # [M, N], contiguous
    p_dr,  # [M, N], contiguous
    p_dw,  # [shares, N], contiguous
    p_db,  # [shares, N], contiguous
    stride_dy,
    stride_dsum,
    stride_z,
    m,
    n,
    share,  # rows of a program
    seed_rows,  # rows that share a seed
    threshold,
    keep_scale: "fp64",
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # n or more, unless dx and dr are None
):
    seeds = tuples.Seeds(p_seed, seed_rows, threshold, keep_scale)
    i_share = tl.program_id(0).to(tl.int64)
    stop = tl.minimum((i_share + 1) * share, m)
    first_n = tl.program_id(1) * BLOCK_N
    o_n = first_n + tl.arange(0, BLOCK_N)
    dw, db = tl.zeros((BLOCK_M, BLOCK_N), ACC), tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(i_share * share, stop, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        dz = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        if p_dy is not None:
            dy = load_tile(p_dy, o_m, o_n, stride_dy, 1, stop, n).to(ACC)
            normal, rstd = load_normal(p_z, p_mean, p_rstd, o_m, o_n, stride_z, stop, n, ACC)
            if p_dw is not None:
                dw += dy * normal  # E19
            if p_db is not None:
                db += dy  # E19
            if p_dx is not None or p_dr is not None:
                g = weighted(dy, p_weight, o_n, n, ACC)
                dz = g - normal * mean_of(g * normal, n)  # E19
                if p_mean is not None:
                    dz -= mean_of(g, n)
                dz *= rstd
        store_gradients(
            p_dx, p_dr, p_dsum, seeds, dz, o_m, first_n, stride_dsum, stop, n, ACC, BLOCK_N
        )  # fmt: skip
    if p_dw is not None:
        tl.store(p_dw + i_share * n + o_n, tl.sum(dw, 0), mask=o_n < n)
    if p_db is not None:
        tl.store(p_db + i_share * n + o_n, tl.sum(db, 0), mask=o_n < n)


@triton.jit(do_not_specialize=["m", "seed_rows", "threshold"])
def norm_backward_wide_kernel(
    p_dy,  # [M, N]
    p_dsum,  # [M, N]
    p_z,  # [M, N]
    p_weight,  # [N]
    p_mean,  # [M]
    p_rstd,  # [M]
    p_seed,
    p_dx,  # [M, N], contiguous
    p_dr,  # [M, N], contiguous
    stride_dy,
    stride_dsum,
    stride_z,
    m,
    n,
    seed_rows,  # rows that share a seed
    threshold,
    keep_scale: "fp64",
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    seeds = tuples.Seeds(p_seed, seed_rows, threshold, keep_scale)
    sum_g, sum_g_normal = tl.zeros((BLOCK_M, BLOCK_N), ACC), tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if p_dy is not None:
        for first in range(0, n, BLOCK_N):
            o_n = first + tl.arange(0, BLOCK_N)
            dy = load_tile(p_dy, o_m, o_n, stride_dy, 1, m, n).to(ACC)
            normal, _ = load_normal(p_z, p_mean, p_rstd, o_m, o_n, stride_z, m, n, ACC)
            g = weighted(dy, p_weight, o_n, n, ACC)
            sum_g += g
            sum_g_normal += g * normal
    mean_g, mean_g_normal = mean_of(sum_g, n), mean_of(sum_g_normal, n)
    for first in range(0, n, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        dz = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        if p_dy is not None:
            dy = load_tile(p_dy, o_m, o_n, stride_dy, 1, m, n).to(ACC)
            normal, rstd = load_normal(p_z, p_mean, p_rstd, o_m, o_n, stride_z, m, n, ACC)
            dz = weighted(dy, p_weight, o_n, n, ACC) - normal * mean_g_normal  # E19
            if p_mean is not None:
                dz -= mean_g
            dz *= rstd
        store_gradients(
            p_dx, p_dr, p_dsum, seeds, dz, o_m, first, stride_dsum, m, n, ACC, BLOCK_N
        )  # fmt: skip


@triton.jit
def add_shares(
    p_shares, p_total, shares, o_n, n,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(0, shares, BLOCK_M):
        total += load_tile(p_shares, first + tl.arange(0, BLOCK_M), o_n, n, 1, shares, n)
    tl.store(p_total + o_n, tl.sum(total, 0).to(p_total.dtype.element_ty), mask=o_n < n)


@triton.jit(do_not_specialize=["shares"])
def norm_add_shares_kernel(
    p_dw_shares,  # [shares, N], contiguous
    p_db_shares,  # [shares, N], contiguous
    p_dw,  # [N]
    p_db,  # [N]
    shares,
    n,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if p_dw is not None:
        add_shares(p_dw_shares, p_dw, shares, o_n, n, ACC, BLOCK_M, BLOCK_N)
    if p_db is not None:
        add_shares(p_db_shares, p_db, shares, o_n, n, ACC, BLOCK_M, BLOCK_N)
