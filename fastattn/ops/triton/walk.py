"""The walk of the attention kernels: a program's place, and the loops over what it walks.

A program of the forward, of the forward mode and of dQ owns a block of queries and walks the keys
that these see; a program of dK and dV owns a block of keys and walks the queries that see these.
Either way the walk is a masked range at each edge of the window and a full one between, or, beside
a mask, the lists of blocks that the mask leaves in part and in full. Each kernel gives its own
step, ``STEP(state, first, own, walked, at, of, SHAPE, ACC, EDGE, FLAGS)``, which returns the
state after the block that begins at ``first``: ``own`` is what the program keeps, ``walked`` the
Rows of what it loads block by block, ``at`` its Place, ``of`` its Weights. Without EDGE every row
of the tile sees every key.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives, tuples

# The arguments of every kernel that depend on a call's lengths: no variant for a multiple of 16.
SIZES = [
    "heads", "batch_heads", "group", "section", "tokens_q", "tokens_k",
    "seq_q", "seq_k", "left", "right", "seed_batch", "threshold",
]  # fmt: skip
SIZES_BUT_GROUP = [name for name in SIZES if name != "group"]

# --- places ---------------------------------------------------------------------------------------


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
def _place(
    i_block,
    i_b,
    i_h,
    i_hk,
    extras,
    tokens_q,
    tokens_k,
    seq_q,
    seq_k,
    BLOCK: tl.constexpr,
    FLAGS: tl.constexpr,
):
    start_q, seq_q = sequence(extras.starts_q, i_b, tokens_q, seq_q, FLAGS)
    start_k, seq_k = sequence(extras.starts_k, i_b, tokens_k, seq_k, FLAGS)
    batch, head, key_head = i_b.to(tl.int64), i_h.to(tl.int64), i_hk.to(tl.int64)
    if flags.VARLEN & FLAGS:
        batch = batch * 0
    return tuples.Place(
        i_block, i_b, i_h, i_hk, batch, head, key_head, start_q, start_k, seq_q, seq_k,
        i_block * BLOCK,
    )  # fmt: skip


@triton.jit
def place_of_queries(
    extras,
    heads,
    batch_heads,
    group,
    section,
    tokens_q,
    tokens_k,
    seq_q,
    seq_k,
    SHAPE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """The block of queries that this program owns: longest blocks first."""
    blocks = tl.cdiv(seq_q, SHAPE.block_q)
    i_block, i_h, i_b = scheduled_block(blocks, heads, batch_heads, section, True)
    return _place(
        i_block, i_b, i_h, i_h // group, extras, tokens_q, tokens_k, seq_q, seq_k, SHAPE.block_q,
        FLAGS,
    )  # fmt: skip


@triton.jit
def place_of_keys(
    extras,
    key_heads,
    batch_heads,
    section,
    tokens_q,
    tokens_k,
    seq_q,
    seq_k,
    SHAPE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """The block of keys that this program owns; at_head says whose queries it walks. Under a causal
    mask the first keys are seen by the most queries."""
    blocks = tl.cdiv(seq_k, SHAPE.block_k)
    i_block, i_hk, i_b = scheduled_block(blocks, key_heads, batch_heads, section, False)
    return _place(
        i_block, i_b, i_hk, i_hk, extras, tokens_q, tokens_k, seq_q, seq_k, SHAPE.block_k, FLAGS
    )


@triton.jit
def place_of_head(i_b, i_h, i_hk, seq_q, seq_k, first):
    """A place in a batch element and head that are known already; no packed sequences."""
    batch, head, key_head = i_b.to(tl.int64), i_h.to(tl.int64), i_hk.to(tl.int64)
    return tuples.Place(0, i_b, i_h, i_hk, batch, head, key_head, 0, 0, seq_q, seq_k, first)


@triton.jit
def at_head(at, i_h):
    """The same place for the queries of head i_h."""
    return tuples.Place(
        at.i_block, at.i_b, i_h, at.i_hk, at.batch, i_h.to(tl.int64), at.key_head, at.start_q,
        at.start_k, at.seq_q, at.seq_k, at.first,
    )  # fmt: skip


@triton.jit
def weights_of(
    at,
    extras,
    mask,
    heads,
    left,
    right,
    seed_batch,
    threshold,
    numbers,
    ACC: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """What the weights of this place's queries and keys depend on. heads: query heads; seed_batch:
    batch elements that share a seed; numbers: scale, cap_scale, cap, keep_scale."""
    # What is absent becomes a number: a function cannot return None inside a tuple.
    slope = 0.0
    if flags.ALIBI & FLAGS:
        slope = tl.load(extras.slopes + at.i_b * heads + at.i_h)
    seed, element, least = at.i_b, at.i_b, 0
    if flags.DROPOUT & FLAGS:
        seed, element = tl.load(extras.seed + at.i_b // seed_batch), at.i_b % seed_batch
        least = threshold
    p_mask, mask_strides, p_t_mask, t_mask_strides = 0, 0, 0, 0
    if flags.MASKED & FLAGS:
        p_mask = mask.p + at.batch * mask.strides[0] + at.head * mask.strides[1]
        mask_strides = mask.strides
    if flags.T_MASK & FLAGS:
        p_t_mask = mask.t + at.batch * mask.t_strides[0] + at.head * mask.t_strides[1]
        t_mask_strides = mask.t_strides
    most_left, most_right = 0, 0
    if flags.WINDOW_LEFT & FLAGS:
        most_left = left
    if flags.WINDOW_RIGHT & FLAGS:
        most_right = right
    scale, cap_scale, cap, keep_scale = numbers
    return tuples.Weights(
        tuples.Band(at.seq_q, at.seq_k, most_left, most_right, p_mask, mask_strides),
        primitives.scalar(scale, ACC),
        primitives.scalar(cap_scale, ACC),
        primitives.scalar(cap, ACC),
        slope,
        tuples.Dropout(seed, element, at.i_h, least, primitives.scalar(keep_scale, ACC)),
        p_t_mask,
        t_mask_strides,
    )


@triton.jit
def statistics_at(p_rows, strides, at, WIDTH: tl.constexpr):
    """The statistics of this place's first query: WIDTH numbers a row, side by side."""
    return p_rows + at.batch * strides[0] + at.head * strides[1] + at.start_q * WIDTH


@triton.jit
def query_and_tangent(p_q, p_t_q, strides, at, o_q, SHAPE: tl.constexpr, FLAGS: tl.constexpr):
    """Q and tQ of this place's queries; Q again where there is no tangent."""
    q_rows = primitives.query_rows(p_q, strides.q, at)
    q = primitives.load_rows(q_rows, o_q, SHAPE.d, SHAPE.block_d, True, FLAGS)
    t_q = q
    if flags.T_QUERY & FLAGS:
        t_q_rows = primitives.query_rows(p_t_q, strides.t_q, at)
        t_q = primitives.load_rows(t_q_rows, o_q, SHAPE.d, SHAPE.block_d, True, FLAGS)
    return q, t_q


@triton.jit
def keys_and_tangents(p_k, p_v, p_t_k, p_t_v, strides, at, FLAGS: tl.constexpr):
    """The Rows of K, V, tK and tV that this place's queries walk; K and V again where there is no
    tangent."""
    k = primitives.walked_keys(p_k, strides.k, at, FLAGS)
    v = primitives.walked_keys(p_v, strides.v, at, FLAGS)
    t_k, t_v = k, v
    if flags.T_KEY & FLAGS:
        t_k = primitives.walked_keys(p_t_k, strides.t_k, at, FLAGS)
    if flags.T_VALUE & FLAGS:
        t_v = primitives.walked_keys(p_t_v, strides.t_v, at, FLAGS)
    return k, v, t_k, t_v


# --- ranges ---------------------------------------------------------------------------------------


@triton.jit
def key_range(i_first, band, SHAPE: tl.constexpr, FLAGS: tl.constexpr):
    """Bounds lo <= full_lo <= full_hi <= hi of the keys that rows [i_first, i_first + BLOCK_Q)
    see; in [full_lo, full_hi) every row sees every key. All but hi are multiples of BLOCK_K."""
    BLOCK_Q: tl.constexpr = SHAPE.block_q
    BLOCK_K: tl.constexpr = SHAPE.block_k
    i_last = tl.minimum(i_first + BLOCK_Q, band.seq_q) - 1
    lo = i_first * 0
    full_lo = lo
    hi = lo + band.seq_k
    full_hi = hi
    if flags.WINDOW_LEFT & FLAGS:
        lo = tl.maximum(i_first - band.left, 0) // BLOCK_K * BLOCK_K
        full_lo = tl.cdiv(tl.maximum(i_last - band.left, 0), BLOCK_K) * BLOCK_K
    if flags.WINDOW_RIGHT & FLAGS:
        hi = tl.minimum(hi, i_last + band.right + 1)
        full_hi = tl.minimum(full_hi, i_first + band.right + 1)
    full_lo = tl.minimum(full_lo, tl.maximum(tl.cdiv(hi, BLOCK_K) * BLOCK_K, lo))
    full_hi = tl.maximum(full_hi // BLOCK_K * BLOCK_K, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def query_range(j_first, band, SHAPE: tl.constexpr, FLAGS: tl.constexpr):
    """key_range of the transposed problem: the rows that see keys [j_first, j_first + BLOCK_K).
    Without a left bound the last rows are full, those beyond seq_q included: their LSE is +inf."""
    BLOCK_Q: tl.constexpr = SHAPE.block_q
    BLOCK_K: tl.constexpr = SHAPE.block_k
    j_last = tl.minimum(j_first + BLOCK_K, band.seq_k) - 1
    lo = j_first * 0
    full_lo = lo
    hi = lo + band.seq_q
    full_hi = tl.cdiv(hi, BLOCK_Q) * BLOCK_Q
    if flags.WINDOW_RIGHT & FLAGS:
        lo = tl.maximum(j_first - band.right, 0) // BLOCK_Q * BLOCK_Q
        full_lo = tl.cdiv(tl.maximum(j_last - band.right, 0), BLOCK_Q) * BLOCK_Q
    if flags.WINDOW_LEFT & FLAGS:
        hi = tl.minimum(hi, j_last + band.left + 1)
        full_hi = tl.minimum(band.seq_q, j_first + band.left + 1)
    full_lo = tl.minimum(full_lo, tl.maximum(tl.cdiv(hi, BLOCK_Q) * BLOCK_Q, lo))
    full_hi = tl.maximum(full_hi // BLOCK_Q * BLOCK_Q, full_lo)
    return lo, full_lo, full_hi, hi


# --- loops ----------------------------------------------------------------------------------------


@triton.jit
def lists_of(at, mask, blocks):
    """Where the counts and the lists of blocks begin that the mask leaves to this place; blocks:
    the most that a list can hold."""
    strides = mask.list_strides
    i_list = at.batch * strides[0] + at.head * strides[1] + at.i_block * strides[2]
    return mask.counts + i_list * 2, mask.lists + i_list * 2 * blocks


@triton.jit
def _walk_lists(
    STEP: tl.constexpr,
    state,
    args,
    mask,
    blocks,
    BLOCK: tl.constexpr,
    SHAPE: tl.constexpr,
    ACC: tl.constexpr,
    FLAGS: tl.constexpr,
):
    p_counts, p_lists = lists_of(args[2], mask, blocks)
    for n in range(0, tl.load(p_counts)):
        first = tl.load(p_lists + n) * BLOCK
        state = STEP(state, first, *args, SHAPE, ACC, True, FLAGS)
    if flags.BOOL_MASK & FLAGS:
        for n in range(0, tl.load(p_counts + 1)):
            first = tl.load(p_lists + blocks + n) * BLOCK
            state = STEP(state, first, *args, SHAPE, ACC, False, FLAGS)
    return state


@triton.jit
def _walk_range(
    STEP: tl.constexpr,
    state,
    args,
    bounds,
    BLOCK: tl.constexpr,
    LEADING: tl.constexpr,  # whether there is an edge before the full blocks
    TRAILING: tl.constexpr,
    SHAPE: tl.constexpr,
    ACC: tl.constexpr,
    FLAGS: tl.constexpr,
):
    lo, full_lo, full_hi, hi = bounds
    if LEADING:
        for first in range(lo, full_lo, BLOCK):
            state = STEP(state, first, *args, SHAPE, ACC, True, FLAGS)
    for first in range(full_lo, full_hi, BLOCK):
        first = tl.multiple_of(first, BLOCK)
        state = STEP(state, first, *args, SHAPE, ACC, False, FLAGS)
    if TRAILING:
        for first in range(full_hi, hi, BLOCK):
            state = STEP(state, first, *args, SHAPE, ACC, True, FLAGS)
    return state


@triton.jit
def walk_keys(
    STEP: tl.constexpr,
    state,
    own,
    walked,
    at,
    of,
    mask,
    SHAPE: tl.constexpr,
    ACC: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """The state after all keys that the program's queries see."""
    args = (own, walked, at, of)
    BLOCK: tl.constexpr = SHAPE.block_k
    if flags.MASKED & FLAGS:
        blocks = tl.cdiv(at.seq_k, BLOCK)
        return _walk_lists(STEP, state, args, mask, blocks, BLOCK, SHAPE, ACC, FLAGS)
    else:
        bounds = key_range(at.first, of.band, SHAPE, FLAGS)
        return _walk_range(
            STEP, state, args, bounds, BLOCK, flags.WINDOW_LEFT & FLAGS, True, SHAPE, ACC, FLAGS
        )


@triton.jit
def walk_queries(
    STEP: tl.constexpr,
    state,
    own,
    walked,
    at,
    of,
    mask,
    SHAPE: tl.constexpr,
    ACC: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """The state after all queries of the head that see the program's keys."""
    args = (own, walked, at, of)
    BLOCK: tl.constexpr = SHAPE.block_q
    if flags.MASKED & FLAGS:
        blocks = tl.cdiv(at.seq_q, BLOCK)
        return _walk_lists(STEP, state, args, mask, blocks, BLOCK, SHAPE, ACC, FLAGS)
    else:
        bounds = query_range(at.first, of.band, SHAPE, FLAGS)
        return _walk_range(
            STEP, state, args, bounds, BLOCK, flags.WINDOW_RIGHT & FLAGS,
            flags.WINDOW_LEFT & FLAGS, SHAPE, ACC, FLAGS,
        )  # fmt: skip
