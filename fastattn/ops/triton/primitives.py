"""What the attention kernels share: tile loads, block ranges, scores, dropout, the schedule.

i is a query position and j a key position, shaped to broadcast against the tile: ``[Q, 1]`` and
``[1, K]``, or, where a kernel works on the transposed tile, ``[1, Q]`` and ``[K, 1]``. Without one
of the flags SCALED a tile of scores and the running maxima are the products themselves, and the
scale is left to the exponent. An exponent begins with a difference, which is exact where e^x is not
small: it is as right for large scores as for small ones.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags

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


# --- tiles ----------------------------------------------------------------------------------------


@triton.jit
def load_rows(
    p_x,
    o_rows,
    stride,
    rows,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Rows o_rows of a head as ``[rows, BLOCK_D]``; zeros beyond the head's extents."""
    o_d = tl.arange(0, BLOCK_D)
    if flags.WIDE & FLAGS:
        o_rows64 = o_rows.to(tl.int64)
        p_tile = p_x + o_rows64[:, None] * stride + o_d[None, :]
    else:
        p_tile = p_x + o_rows[:, None] * stride + o_d[None, :]
    if CHECK and DIM != BLOCK_D:
        return tl.load(p_tile, mask=(o_rows < rows)[:, None] & (o_d < DIM)[None, :], other=0.0)
    if CHECK:
        return tl.load(p_tile, mask=(o_rows < rows)[:, None], other=0.0)
    if DIM != BLOCK_D:
        return tl.load(p_tile, mask=(o_d < DIM)[None, :], other=0.0)
    return tl.load(p_tile)


@triton.jit
def load_block(
    x,
    i_b,
    i_h,
    first,
    o_rows,
    stride,
    rows,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """load_rows of consecutive rows. ``x`` is a pointer to the head, or the descriptor of all of
    ``[B, H, S, D]``, whose loads are zeros beyond every extent."""
    if flags.TMA & FLAGS:
        return tl.reshape(x.load([i_b, i_h, first, 0]), (BLOCK_ROWS, BLOCK_D))
    else:
        return load_rows(x, o_rows, stride, rows, DIM, BLOCK_D, CHECK, FLAGS)


@triton.jit
def head_pointer(p_x, i_b64, i_h64, start, strides, FLAGS: tl.constexpr):
    """A streamed operand at its head and first row; a descriptor stays as it is."""
    if flags.TMA & FLAGS:
        return p_x
    else:
        return p_x + i_b64 * strides[0] + i_h64 * strides[1] + start * strides[2]


@triton.jit
def store_rows(
    p_x, o_rows, tile, stride, rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr, FLAGS: tl.constexpr
):
    """The inverse of load_rows."""
    o_d = tl.arange(0, BLOCK_D)
    if flags.WIDE & FLAGS:
        o_rows64 = o_rows.to(tl.int64)
        p_tile = p_x + o_rows64[:, None] * stride + o_d[None, :]
    else:
        p_tile = p_x + o_rows[:, None] * stride + o_d[None, :]
    m_tile = (o_rows < rows)[:, None] & (o_d < DIM)[None, :]
    tl.store(p_tile, tile.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def clear_rows(tile, used):
    """Zeros where used is false, so that a NaN there meets no sum: 0 * NaN is NaN."""
    return tl.where(used[:, None], tile, tl.zeros((), tile.dtype))


# --- schedule -------------------------------------------------------------------------------------


@triton.jit
def scheduled_block(blocks, heads, batch_heads, section, LAST_FIRST: tl.constexpr):
    """This program's block, head and batch. Sections of heads whose operands fit in L2 run one
    after the other; within a section all heads run their longest block first."""
    pid = tl.program_id(0)
    first = pid // (section * blocks) * section
    here = tl.minimum(section, batch_heads - first)
    rest = pid - first * blocks
    i_block = rest // here
    if LAST_FIRST:
        i_block = blocks - 1 - i_block
    i_bh = first + rest % here
    return i_block, i_bh % heads, i_bh // heads


@triton.jit
def sequence(p_starts, i_b, tokens, longest, FLAGS: tl.constexpr):
    """Where batch element i_b's rows begin, and how many it has; inside the tensor whatever
    p_starts holds."""
    start = i_b.to(tl.int64) * 0
    length = longest
    if flags.VARLEN & FLAGS:
        start = tl.minimum(tl.maximum(tl.load(p_starts + i_b).to(tl.int64), 0), tokens)
        stop = tl.minimum(tl.load(p_starts + i_b + 1).to(tl.int64), tokens)
        length = tl.minimum(tl.maximum(stop - start, 0), longest).to(tl.int32)
    return start, length


@triton.jit
def key_range(
    i_first, seq_q, seq_k, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FLAGS
):
    """Bounds lo <= full_lo <= full_hi <= hi of the keys that rows [i_first, i_first + BLOCK_Q)
    see; in [full_lo, full_hi) every row sees every key. All but hi are multiples of BLOCK_K."""
    i_last = tl.minimum(i_first + BLOCK_Q, seq_q) - 1
    lo = i_first * 0
    full_lo = lo
    hi = lo + seq_k
    full_hi = hi
    if flags.WINDOW_LEFT & FLAGS:
        lo = tl.maximum(i_first - left, 0) // BLOCK_K * BLOCK_K
        full_lo = tl.cdiv(tl.maximum(i_last - left, 0), BLOCK_K) * BLOCK_K
    if flags.WINDOW_RIGHT & FLAGS:
        hi = tl.minimum(hi, i_last + right + 1)
        full_hi = tl.minimum(full_hi, i_first + right + 1)
    full_lo = tl.minimum(full_lo, tl.maximum(tl.cdiv(hi, BLOCK_K) * BLOCK_K, lo))
    full_hi = tl.maximum(full_hi // BLOCK_K * BLOCK_K, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def query_range(
    j_first, seq_q, seq_k, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FLAGS
):
    """key_range of the transposed problem: the rows that see keys [j_first, j_first + BLOCK_K).
    Without a left bound the last rows are full, those beyond seq_q included: their LSE is +inf."""
    j_last = tl.minimum(j_first + BLOCK_K, seq_k) - 1
    lo = j_first * 0
    full_lo = lo
    hi = lo + seq_q
    full_hi = tl.cdiv(hi, BLOCK_Q) * BLOCK_Q
    if flags.WINDOW_RIGHT & FLAGS:
        lo = tl.maximum(j_first - right, 0) // BLOCK_Q * BLOCK_Q
        full_lo = tl.cdiv(tl.maximum(j_last - right, 0), BLOCK_Q) * BLOCK_Q
    if flags.WINDOW_LEFT & FLAGS:
        hi = tl.minimum(hi, j_last + left + 1)
        full_hi = tl.minimum(seq_q, j_first + left + 1)
    full_lo = tl.minimum(full_lo, tl.maximum(tl.cdiv(hi, BLOCK_Q) * BLOCK_Q, lo))
    full_hi = tl.maximum(full_hi // BLOCK_Q * BLOCK_Q, full_lo)
    return lo, full_lo, full_hi, hi


# --- scores ---------------------------------------------------------------------------------------


@triton.jit
def visible_keys(i, j, seq_k, left, right, p_mask, mask_strides, seq_q, FLAGS: tl.constexpr):
    """Which elements of a tile are visible, and the float mask's (0 where there is none)."""
    visible = (i >= 0) & (j < seq_k)
    bias = 0.0
    if flags.WINDOW_LEFT & FLAGS:
        visible = visible & (j >= i - left)
    if flags.WINDOW_RIGHT & FLAGS:
        visible = visible & (j <= i + right)
    if flags.MASKED & FLAGS:
        if flags.WIDE & FLAGS:
            p_tile = p_mask + i.to(tl.int64) * mask_strides[2] + j.to(tl.int64) * mask_strides[3]
        else:
            p_tile = p_mask + i * mask_strides[2] + j * mask_strides[3]
        m_tile = (i < seq_q) & (j < seq_k)
        if flags.BOOL_MASK & FLAGS:
            visible = visible & (tl.load(p_tile, mask=m_tile, other=0) != 0)
        else:
            bias = tl.load(p_tile, mask=m_tile, other=float("-inf"))
            visible = visible & (bias != float("-inf"))
    return visible, bias


@triton.jit
def scores(
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
    EDGE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """E1: the scores of a tile of Q Kᵀ, the softcap's tanh and which elements are visible; where
    hidden -inf and 0. Without EDGE every element is visible and there is no mask."""
    capped = 0.0
    if flags.SOFTCAP & FLAGS:
        capped = tanh(qk * cap_scale)
        s = capped * cap  # E1
    elif flags.SCALED & FLAGS:
        s = qk * scale  # E1
    else:
        s = qk
    if flags.ALIBI & FLAGS:
        s -= slope * tl.abs(i - j).to(qk.dtype)  # E1
    visible = j < seq_k
    if EDGE:
        visible, bias = visible_keys(i, j, seq_k, left, right, p_mask, mask_strides, seq_q, FLAGS)
        visible = visible & (i < seq_q)
        if flags.FLOAT_MASK & FLAGS:
            s += bias.to(qk.dtype)  # E1
        s = tl.where(visible, s, float("-inf"))
        if flags.SOFTCAP & FLAGS:
            capped = tl.where(visible, capped, 0.0)
    return s, capped, visible


@triton.jit
def used_keys(visible, o_k, i_first, seq_q, seq_k, left, right, BLOCK_Q: tl.constexpr, FLAGS):
    """Which keys of a tile with visible ``[Q, K]`` any of its rows sees."""
    if flags.MASKED & FLAGS:
        return tl.max(visible.to(tl.int32), 0) != 0
    used = o_k < seq_k
    if flags.WINDOW_LEFT & FLAGS:
        used = used & (o_k >= i_first - left)
    if flags.WINDOW_RIGHT & FLAGS:
        used = used & (o_k <= tl.minimum(i_first + BLOCK_Q, seq_q) - 1 + right)
    return used


@triton.jit
def dropout_seed(p_seed, i_b, seed_batch, FLAGS: tl.constexpr):
    """Batch element i_b's seed, and which of the seed_batch elements that share it i_b is."""
    if flags.DROPOUT & FLAGS:
        return tl.load(p_seed + i_b // seed_batch), i_b % seed_batch
    else:
        return i_b, i_b


@triton.jit
def dropout_keep(seed, i_h, o_q, j_first, threshold, BLOCK_K: tl.constexpr):
    """The keep-mask ``[Q, BLOCK_K]``: word j % 4 of Philox at (j / 4, i, head, batch), of
    dropout_seed's pair."""
    o_k4 = j_first // 4 + tl.arange(0, BLOCK_K // 4)
    w0, w1, w2, w3 = tl.philox(seed[0], o_k4[None, :], o_q[:, None], i_h, seed[1])
    least = tl.full((), threshold, tl.uint32)
    even = tl.interleave((w0 >= least).to(tl.int8), (w2 >= least).to(tl.int8))
    odd = tl.interleave((w1 >= least).to(tl.int8), (w3 >= least).to(tl.int8))
    return tl.interleave(even, odd) != 0
