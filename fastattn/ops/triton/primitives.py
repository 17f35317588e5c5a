"""What the attention kernels share within a tile: loads and stores, scores, dropout.

i is a query position and j a key position, shaped to broadcast against the tile: ``[Q, 1]`` and
``[1, K]``, or, where a kernel works on the transposed tile, ``[1, Q]`` and ``[K, 1]``. Without one
of the flags SCALED a tile of scores and the running maxima are the products themselves, and the
scale is left to the exponent. An exponent begins with a difference, which is exact where e^x is not
small: it is as right for large scores as for small ones.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, tuples

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# --- numbers --------------------------------------------------------------------------------------


@triton.jit
def scalar(x, DTYPE: tl.constexpr):
    """A kernel's fp64 argument in the accumulator's type; the interpreter passes Python floats."""
    return tl.full((), x, DTYPE)


@triton.jit
def dot(a, b, ACC: tl.constexpr, FLAGS: tl.constexpr):
    """a @ b: tensor cores for 16 bits, fp32 as config.float32_products says, fp64 for fp64."""
    if flags.UPCAST & FLAGS:
        a = a.to(ACC)
        b = b.to(ACC)
    if flags.TF32 & FLAGS:
        return tl.dot(a, b, input_precision="tf32", out_dtype=ACC)
    if flags.TF32X3 & FLAGS:
        return tl.dot(a, b, input_precision="tf32x3", out_dtype=ACC)
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def unit_of_scores(scale, FLAGS: tl.constexpr):
    """The factor that makes a tile of scores natural scores."""
    if flags.SCALED & FLAGS:
        return tl.full((), 1.0, scale.dtype)
    return scale


@triton.jit
def weights(s, softmax, scale, FLAGS: tl.constexpr):
    """P of a tile of scores, E6; softmax: the row's maximum, and its sum's logarithm in base 2,
    shaped like i."""
    factor = unit_of_scores(scale, FLAGS) * LOG2_E
    return tl.exp2((s - softmax[0]) * factor - softmax[1])


@triton.jit
def as_column(pair):
    """``[Q]`` -> ``[Q, 1]``."""
    return pair[0][:, None], pair[1][:, None]


@triton.jit
def as_row(pair):
    """``[Q]`` -> ``[1, Q]``."""
    return pair[0][None, :], pair[1][None, :]


@triton.jit
def tanh(x):
    """Near 0 by a continued fraction: 1 - 2 / (e^2x + 1) cancels there."""
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    near = tl.where(tl.abs(x) < 0.5, x, 0.0)
    y = near * near
    top = 34459425.0 + y * (4729725.0 + y * (135135.0 + y * (990.0 + y)))
    bottom = 34459425.0 + y * (16216200.0 + y * (945945.0 + y * (13860.0 + y * 45.0)))
    return tl.where(tl.abs(x) < 0.5, near * top / bottom, far)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """tl.zeros of fields of a Shape, which tl.zeros refuses inside a tuple."""
    return tl.zeros((ROWS, COLUMNS), DTYPE)


# --- tiles ----------------------------------------------------------------------------------------


@triton.jit
def rows_of(p_x, strides, batch, head, start, count):
    """The rows of one head of a tensor, from the row ``start`` on."""
    p_x += batch * strides[0] + head * strides[1] + start * strides[2]
    return tuples.Rows(p_x, strides[2], count, 0, 0)


@triton.jit
def query_rows(p_x, strides, at):
    """This program's rows of a tensor that has a row for each query."""
    return rows_of(p_x, strides, at.batch, at.head, at.start_q, at.seq_q)


@triton.jit
def key_rows(p_x, strides, at):
    """This program's rows of a tensor that has a row for each key."""
    return rows_of(p_x, strides, at.batch, at.key_head, at.start_k, at.seq_k)


@triton.jit
def walked_queries(x, strides, at, FLAGS: tl.constexpr):
    """query_rows of a tensor that the program walks: with TMA ``x`` is its descriptor."""
    if flags.TMA & FLAGS:
        return tuples.Rows(x, strides[2], at.seq_q, at.i_b, at.i_h)
    else:
        return query_rows(x, strides, at)


@triton.jit
def walked_keys(x, strides, at, FLAGS: tl.constexpr):
    """key_rows of a tensor that the program walks: with TMA ``x`` is its descriptor."""
    if flags.TMA & FLAGS:
        return tuples.Rows(x, strides[2], at.seq_k, at.i_b, at.i_hk)
    else:
        return key_rows(x, strides, at)


@triton.jit
def load_rows(
    rows, o_rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr, FLAGS: tl.constexpr
):
    """Rows o_rows of a head as ``[rows, BLOCK_D]``; zeros beyond the head's extents."""
    o_d = tl.arange(0, BLOCK_D)
    if flags.WIDE & FLAGS:
        o_rows64 = o_rows.to(tl.int64)
        p_tile = rows.x + o_rows64[:, None] * rows.stride + o_d[None, :]
    else:
        p_tile = rows.x + o_rows[:, None] * rows.stride + o_d[None, :]
    if CHECK and DIM != BLOCK_D:
        m_tile = (o_rows < rows.count)[:, None] & (o_d < DIM)[None, :]
        return tl.load(p_tile, mask=m_tile, other=0.0)
    if CHECK:
        return tl.load(p_tile, mask=(o_rows < rows.count)[:, None], other=0.0)
    if DIM != BLOCK_D:
        return tl.load(p_tile, mask=(o_d < DIM)[None, :], other=0.0)
    return tl.load(p_tile)


@triton.jit
def load_block(
    rows,
    first,
    BLOCK_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """load_rows of BLOCK_ROWS consecutive rows that the program walks; a descriptor's loads are
    zeros beyond every extent."""
    if flags.TMA & FLAGS:
        return tl.reshape(rows.x.load([rows.i_b, rows.i_h, first, 0]), (BLOCK_ROWS, BLOCK_D))
    else:
        return load_rows(rows, first + tl.arange(0, BLOCK_ROWS), DIM, BLOCK_D, CHECK, FLAGS)


@triton.jit
def store_rows(rows, o_rows, tile, DIM: tl.constexpr, BLOCK_D: tl.constexpr, FLAGS: tl.constexpr):
    """The inverse of load_rows."""
    o_d = tl.arange(0, BLOCK_D)
    if flags.WIDE & FLAGS:
        o_rows64 = o_rows.to(tl.int64)
        p_tile = rows.x + o_rows64[:, None] * rows.stride + o_d[None, :]
    else:
        p_tile = rows.x + o_rows[:, None] * rows.stride + o_d[None, :]
    m_tile = (o_rows < rows.count)[:, None] & (o_d < DIM)[None, :]
    tl.store(p_tile, tile.to(rows.x.dtype.element_ty), mask=m_tile)


@triton.jit
def clear_rows(tile, used):
    """Zeros where used is false, so that a NaN there meets no sum: 0 * NaN is NaN."""
    return tl.where(used[:, None], tile, tl.zeros((), tile.dtype))


# --- scores ---------------------------------------------------------------------------------------


@triton.jit
def visible_keys(i, j, band, FLAGS: tl.constexpr):
    """Which elements of a tile are visible, and the float mask's (0 where there is none)."""
    visible = (i >= 0) & (j < band.seq_k)
    bias = 0.0
    if flags.WINDOW_LEFT & FLAGS:
        visible = visible & (j >= i - band.left)
    if flags.WINDOW_RIGHT & FLAGS:
        visible = visible & (j <= i + band.right)
    if flags.MASKED & FLAGS:
        strides = band.mask_strides
        if flags.WIDE & FLAGS:
            p_tile = band.p_mask + i.to(tl.int64) * strides[2] + j.to(tl.int64) * strides[3]
        else:
            p_tile = band.p_mask + i * strides[2] + j * strides[3]
        m_tile = (i < band.seq_q) & (j < band.seq_k)
        if flags.BOOL_MASK & FLAGS:
            visible = visible & (tl.load(p_tile, mask=m_tile, other=0) != 0)
        else:
            bias = tl.load(p_tile, mask=m_tile, other=float("-inf"))
            visible = visible & (bias != float("-inf"))
    return visible, bias


@triton.jit
def scores(qk, i, j, of, EDGE: tl.constexpr, FLAGS: tl.constexpr):
    """E1: the scores of a tile of Q Kᵀ, the softcap's tanh and which elements are visible; where
    hidden -inf and 0. Without EDGE every element is visible and there is no mask."""
    capped = 0.0
    if flags.SOFTCAP & FLAGS:
        capped = tanh(qk * of.cap_scale)
        s = capped * of.cap  # E1
    elif flags.SCALED & FLAGS:
        s = qk * of.scale  # E1
    else:
        s = qk
    if flags.ALIBI & FLAGS:
        s -= of.slope * tl.abs(i - j).to(qk.dtype)  # E1
    visible = j < of.band.seq_k
    if EDGE:
        visible, bias = visible_keys(i, j, of.band, FLAGS)
        visible = visible & (i < of.band.seq_q)
        if flags.FLOAT_MASK & FLAGS:
            s += bias.to(qk.dtype)  # E1
        s = tl.where(visible, s, float("-inf"))
        if flags.SOFTCAP & FLAGS:
            capped = tl.where(visible, capped, 0.0)
    return s, capped, visible


@triton.jit
def used_keys(visible, o_k, i_first, band, BLOCK_Q: tl.constexpr, FLAGS: tl.constexpr):
    """Which keys of a tile with visible ``[Q, K]`` any of its rows sees."""
    if flags.MASKED & FLAGS:
        return tl.max(visible.to(tl.int32), 0) != 0
    used = o_k < band.seq_k
    if flags.WINDOW_LEFT & FLAGS:
        used = used & (o_k >= i_first - band.left)
    if flags.WINDOW_RIGHT & FLAGS:
        used = used & (o_k <= tl.minimum(i_first + BLOCK_Q, band.seq_q) - 1 + band.right)
    return used


@triton.jit
def dropout_keep(dropout, o_q, j_first, BLOCK_K: tl.constexpr):
    """The keep-mask ``[Q, BLOCK_K]``: word j % 4 of Philox at (j / 4, i, head, batch element)."""
    o_k4 = j_first // 4 + tl.arange(0, BLOCK_K // 4)
    w0, w1, w2, w3 = tl.philox(
        dropout.seed, o_k4[None, :], o_q[:, None], dropout.i_h, dropout.element
    )
    least = tl.full((), dropout.threshold, tl.uint32)
    even = tl.interleave((w0 >= least).to(tl.int8), (w2 >= least).to(tl.int8))
    odd = tl.interleave((w1 >= least).to(tl.int8), (w3 >= least).to(tl.int8))
    return tl.interleave(even, odd) != 0
