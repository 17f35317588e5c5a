"""Linear layers with a ReLU, E15-E17: ``y = relu(x Wᵀ + b)`` and one bit an element of what passed.

1. ``linear_relu_forward_kernel``: a program owns a tile of y and its bits.
2. ``linear_relu_input_gradient_kernel``: a tile of dX; dY is masked while it is loaded.
3. ``linear_relu_weight_gradient_kernel``: a tile of dW over a share of the rows; the first column
   of tiles adds up the bias gradient on the way.
4. ``linear_relu_jvp_kernel``: a tile of tY, both products into one sum.
5. ``relu_bits_kernel`` and ``masked_gradient_kernel`` are the element by element parts beside a
   product that cuBLAS does.
"""

import triton
import triton.language as tl

from fastattn.ops.triton.primitives import dot


@triton.jit
def tile_of(tiles_m, tiles_n, GROUP: tl.constexpr):
    """This program's tile: GROUP rows of tiles at a time, column by column, to share both
    operands in L2."""
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    rest = pid - first * tiles_n
    return first + rest % rows, rest // rows


@triton.jit
def load_tile(p_x, o_rows, o_columns, stride_row, stride_column, rows, columns):
    """``[len(o_rows), len(o_columns)]``, zeros beyond rows and columns."""
    p_tile = p_x + o_rows.to(tl.int64)[:, None] * stride_row
    p_tile += o_columns[None, :] * stride_column
    return tl.load(
        p_tile, mask=(o_rows < rows)[:, None] & (o_columns < columns)[None, :], other=0.0
    )


@triton.jit
def load_passes(p_bits, o_m, o_n, m, n):
    """R, ``[len(o_m), len(o_n)]``."""
    p_bytes = p_bits + o_m.to(tl.int64)[:, None] * ((n + 7) // 8) + (o_n // 8)[None, :]
    bits = tl.load(p_bytes, mask=(o_m < m)[:, None] & (o_n < n)[None, :], other=0)
    return ((bits >> (o_n % 8).to(tl.uint8)[None, :]) & 1) != 0


@triton.jit
def load_masked(p_dy, p_bits, o_m, o_n, stride_dy, stride_dy_column, m, n):
    """G = dY∘R, ``[len(o_m), len(o_n)]``."""
    dy = load_tile(p_dy, o_m, o_n, stride_dy, stride_dy_column, m, n)
    passes = load_passes(p_bits, o_m, o_n, m, n)
    return tl.where(passes, dy, tl.zeros((), dy.dtype))  # E16


@triton.jit
def store_bits(p_bits, o_m, i_n, passes, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Eight columns a byte, the first in the lowest bit."""
    weights = 1 << tl.arange(0, 8)
    grouped = tl.reshape(passes.to(tl.int32), (BLOCK_M, BLOCK_N // 8, 8))
    bytes_ = tl.sum(grouped * weights[None, None, :], 2).to(tl.uint8)
    o_byte = i_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    row_bytes = (n + 7) // 8
    p_tile = p_bits + o_m.to(tl.int64)[:, None] * row_bytes + o_byte[None, :]
    tl.store(p_tile, bytes_, mask=(o_m < m)[:, None] & (o_byte < row_bytes)[None, :])


@triton.jit(do_not_specialize=["m"])
def linear_relu_forward_kernel(
    p_x,  # [M, K]
    p_w,  # [N, K]
    p_bias,  # [N]
    p_y,  # [M, N], contiguous
    p_bits,  # [M, ceil(N / 8)]
    stride_x,
    stride_w,
    m,
    n,
    k,
    ACC: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_m, i_n = tile_of(tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), 8)
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(0, k, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        x = load_tile(p_x, o_m, o_k, stride_x, 1, m, k)
        w = load_tile(p_w, o_n, o_k, stride_w, 1, n, k)
        acc += dot(x, tl.trans(w), ACC, FLAGS)  # E15
    if p_bias is not None:
        acc += tl.load(p_bias + o_n, mask=o_n < n, other=0.0).to(ACC)[None, :]
    passes = (acc != acc) | (acc > 0.0)  # a NaN passes
    y = tl.where(passes, acc, 0.0)
    store_bits(p_bits, o_m, i_n, passes & (o_n < n)[None, :], m, n, BLOCK_M, BLOCK_N)
    p_tile = p_y + o_m.to(tl.int64)[:, None] * n + o_n[None, :]
    tl.store(p_tile, y.to(p_y.dtype.element_ty), mask=(o_m < m)[:, None] & (o_n < n)[None, :])


@triton.jit(do_not_specialize=["m"])
def linear_relu_input_gradient_kernel(
    p_dy,  # [M, N]
    p_bits,
    p_w,  # [N, K]
    p_dx,  # [M, K], contiguous
    stride_dy,
    stride_dy_column,
    stride_w,
    m,
    n,
    k,
    ACC: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of dX
    BLOCK_K: tl.constexpr,  # the depth: columns of dY
):
    i_m, i_k = tile_of(tl.cdiv(m, BLOCK_M), tl.cdiv(k, BLOCK_N), 8)
    o_m, o_k = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_k * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(0, n, BLOCK_K):
        o_n = first + tl.arange(0, BLOCK_K)
        g = load_masked(p_dy, p_bits, o_m, o_n, stride_dy, stride_dy_column, m, n)
        w = load_tile(p_w, o_n, o_k, stride_w, 1, n, k)
        acc += dot(g, w, ACC, FLAGS)  # E16
    p_tile = p_dx + o_m.to(tl.int64)[:, None] * k + o_k[None, :]
    tl.store(p_tile, acc.to(p_dx.dtype.element_ty), mask=(o_m < m)[:, None] & (o_k < k)[None, :])


@triton.jit(do_not_specialize=["m", "share"])
def linear_relu_weight_gradient_kernel(
    p_dy,  # [M, N]
    p_bits,
    p_x,  # [M, K]
    p_dw,  # [parts, N, K]
    p_db,  # [parts, N]
    stride_dy,
    stride_dy_column,
    stride_x,
    m,
    n,
    k,
    share,  # rows of a part
    ACC: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of dW
    BLOCK_N: tl.constexpr,  # columns of dW
    BLOCK_K: tl.constexpr,  # the depth: rows of dY and x
):
    i_n, i_k = tile_of(tl.cdiv(n, BLOCK_M), tl.cdiv(k, BLOCK_N), 8)
    i_part = tl.program_id(1)
    o_n, o_k = i_n * BLOCK_M + tl.arange(0, BLOCK_M), i_k * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    db = tl.zeros((BLOCK_M,), ACC)
    stop = tl.minimum(m, (i_part + 1) * share)
    for first in range(i_part * share, stop, BLOCK_K):
        o_m = first + tl.arange(0, BLOCK_K)
        g = load_masked(p_dy, p_bits, o_m, o_n, stride_dy, stride_dy_column, stop, n)
        x = load_tile(p_x, o_m, o_k, stride_x, 1, stop, k)
        acc += dot(tl.trans(g), x, ACC, FLAGS)  # E16
        if i_k == 0:
            db += tl.sum(g.to(ACC), 0)  # E16
    p_tile = p_dw + (i_part.to(tl.int64) * n + o_n)[:, None] * k + o_k[None, :]
    tl.store(p_tile, acc.to(p_dw.dtype.element_ty), mask=(o_n < n)[:, None] & (o_k < k)[None, :])
    if i_k == 0:
        tl.store(p_db + i_part * n + o_n, db.to(p_db.dtype.element_ty), mask=o_n < n)


@triton.jit(do_not_specialize=["m"])
def linear_relu_jvp_kernel(
    p_x,  # [M, K]
    p_w,  # [N, K]
    p_t_x,
    p_t_w,
    p_t_bias,  # [N]
    p_bits,  # [M, ceil(N / 8)]
    p_t_y,  # [M, N], contiguous
    stride_x,
    stride_w,
    stride_t_x,
    stride_t_w,
    m,
    n,
    k,
    ACC: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_m, i_n = tile_of(tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), 8)
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(0, k, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        if p_t_x is not None:
            t_x = load_tile(p_t_x, o_m, o_k, stride_t_x, 1, m, k)
            w = load_tile(p_w, o_n, o_k, stride_w, 1, n, k)
            acc += dot(t_x, tl.trans(w), ACC, FLAGS)  # E17
        if p_t_w is not None:
            x = load_tile(p_x, o_m, o_k, stride_x, 1, m, k)
            t_w = load_tile(p_t_w, o_n, o_k, stride_t_w, 1, n, k)
            acc += dot(x, tl.trans(t_w), ACC, FLAGS)  # E17
    if p_t_bias is not None:
        acc += tl.load(p_t_bias + o_n, mask=o_n < n, other=0.0).to(ACC)[None, :]
    t_y = tl.where(load_passes(p_bits, o_m, o_n, m, n), acc, 0.0)  # E17
    p_tile = p_t_y + o_m.to(tl.int64)[:, None] * n + o_n[None, :]
    tl.store(p_tile, t_y.to(p_t_y.dtype.element_ty), mask=(o_m < m)[:, None] & (o_n < n)[None, :])


@triton.jit(do_not_specialize=["m"])
def relu_bits_kernel(
    p_y,  # [M, N], contiguous; its ReLU replaces it
    p_bits,
    m,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_tile = (o_m < m)[:, None] & (o_n < n)[None, :]
    p_tile = p_y + o_m.to(tl.int64)[:, None] * n + o_n[None, :]
    y = tl.load(p_tile, mask=m_tile, other=0.0)
    wide = y
    if y.dtype == tl.bfloat16:
        wide = y.to(tl.float32)  # the interpreter compares bfloat16 as integers
    passes = (wide != wide) | (wide > 0.0)
    tl.store(p_tile, tl.where(passes, y, tl.zeros((), y.dtype)), mask=m_tile)
    store_bits(p_bits, o_m, i_n, passes, m, n, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["m"])
def masked_gradient_kernel(
    p_dy,  # [M, N]
    p_bits,
    p_g,  # [M, N], contiguous
    p_db,  # [ceil(M / BLOCK_M), N]: what each block of rows adds to the bias gradient
    stride_dy,
    stride_dy_column,
    m,
    n,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    g = load_masked(p_dy, p_bits, o_m, o_n, stride_dy, stride_dy_column, m, n)
    p_tile = p_g + o_m.to(tl.int64)[:, None] * n + o_n[None, :]
    tl.store(p_tile, g, mask=(o_m < m)[:, None] & (o_n < n)[None, :])
    if BIAS:
        db = tl.sum(g.to(p_db.dtype.element_ty), 0)  # E16
        tl.store(p_db + i_m.to(tl.int64) * n + o_n, db, mask=o_n < n)
