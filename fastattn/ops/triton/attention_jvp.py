"""The forward mode, E12, from the forward's output and LSE.

Grid: one program for each (block of BLOCK_Q queries, query head, batch), longest block first. It
owns its rows of tO and tLSE = μ, and walks its keys as the forward does; with the LSE known there
is no running maximum.
"""

import triton
import triton.language as tl

from fastattn.ops.triton import flags, primitives
from fastattn.ops.triton.attention_backward import load_softmax
from fastattn.ops.triton.attention_tangent import weights_and_tangent


@triton.jit
def _jvp_step(
    t_acc,  # [BLOCK_Q, BLOCK_DV]
    mu,  # [BLOCK_Q]
    j_first,
    q,
    t_q,
    softmax,
    i_first,
    i_b,
    i_h,
    i_hk,
    p_k,
    p_v,
    p_t_k,
    p_t_v,
    p_mask,
    p_t_mask,
    stride_k,
    stride_v,
    t_k_strides,
    t_v_strides,
    mask_strides,
    t_mask_strides,
    seq_q,
    seq_k,
    left,
    right,
    scale,
    cap_scale,
    cap,
    slope,
    seed,
    threshold,
    SHAPE: tl.constexpr,  # D, Dv, both rounded up, rows and columns of the tile
    ACC: tl.constexpr,
    EDGE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """One block of keys: E12."""
    HEAD_DIM: tl.constexpr = SHAPE[0]
    HEAD_DIM_V: tl.constexpr = SHAPE[1]
    BLOCK_D: tl.constexpr = SHAPE[2]
    BLOCK_DV: tl.constexpr = SHAPE[3]
    BLOCK_Q: tl.constexpr = SHAPE[4]
    BLOCK_K: tl.constexpr = SHAPE[5]
    o_q = i_first + tl.arange(0, BLOCK_Q)
    o_k = j_first + tl.arange(0, BLOCK_K)
    k = primitives.load_block(
        p_k, i_b, i_hk, j_first, o_k, stride_k, seq_k, HEAD_DIM, BLOCK_K, BLOCK_D, EDGE, FLAGS
    )
    t_k = k
    if flags.T_KEY & FLAGS:
        t_k = primitives.load_block(
            p_t_k, i_b, i_hk, j_first, o_k, t_k_strides[2], seq_k, HEAD_DIM, BLOCK_K, BLOCK_D, EDGE,
            FLAGS,
        )  # fmt: skip
    p, a, _, _, visible = weights_and_tangent(  # [BLOCK_Q, BLOCK_K]
        q,
        t_q,
        k,
        t_k,
        primitives.as_column(softmax),
        0.0,
        o_q[:, None],
        o_k[None, :],
        seq_q,
        seq_k,
        left,
        right,
        scale,
        cap_scale,
        cap,
        slope,
        p_mask,
        p_t_mask,
        mask_strides,
        t_mask_strides,
        ACC,
        flags.T_QUERY,
        flags.T_KEY,
        EDGE,
        FLAGS,
    )
    used = o_k < seq_k
    if EDGE and ((flags.MASKED | flags.WINDOWED) & FLAGS):
        used = primitives.used_keys(
            visible, o_k, i_first, seq_q, seq_k, left, right, BLOCK_Q, FLAGS
        )
    keep = True
    if flags.DROPOUT & FLAGS:
        keep = primitives.dropout_keep(seed, i_h, o_q, j_first, threshold, BLOCK_K)
    if flags.T_SCORES & FLAGS:
        pa = p * a
        mu += tl.sum(pa, 1)  # E12
        if flags.DROPOUT & FLAGS:
            pa = tl.where(keep, pa, 0.0)
        v = primitives.load_block(
            p_v, i_b, i_hk, j_first, o_k, stride_v, seq_k, HEAD_DIM_V, BLOCK_K, BLOCK_DV, EDGE,
            FLAGS,
        )  # fmt: skip
        if EDGE and ((flags.MASKED | flags.WINDOWED) & FLAGS):
            v = primitives.clear_rows(v, used)
        t_acc += primitives.dot(pa.to(v.dtype), v, ACC, FLAGS)  # E12
    if flags.T_VALUE & FLAGS:
        if flags.DROPOUT & FLAGS:
            p = tl.where(keep, p, 0.0)
        t_v = primitives.load_block(
            p_t_v, i_b, i_hk, j_first, o_k, t_v_strides[2], seq_k, HEAD_DIM_V, BLOCK_K, BLOCK_DV,
            EDGE, FLAGS,
        )  # fmt: skip
        if EDGE and ((flags.MASKED | flags.WINDOWED) & FLAGS):
            t_v = primitives.clear_rows(t_v, used)
        t_acc += primitives.dot(p.to(t_v.dtype), t_v, ACC, FLAGS)  # E12
    return t_acc, mu


@triton.jit(
    do_not_specialize=[
        "heads", "batch_heads", "group", "section", "tokens_q", "tokens_k",
        "seq_q", "seq_k", "left", "right", "seed_batch", "threshold",
    ]
)  # fmt: skip
def attention_jvp_kernel(
    p_q,  # [B, Hq, Sq, D]
    p_k,  # [B, Hk, Sk, D]; with TMA the tensor's descriptor
    p_v,  # [B, Hk, Sk, Dv]; the same
    p_t_q,  # like what they are tangents of
    p_t_k,
    p_t_v,
    p_o,  # [B, Hq, Sq, Dv]
    p_max,  # [B, Hq, Sq]: of the forward's softmax, as p_log_sum
    p_log_sum,
    p_t_o,  # [B, Hq, Sq, Dv]
    p_mu,  # [B, Hq, Sq]
    p_mask,
    p_t_mask,
    p_lists,  # [..., 2, key blocks]
    p_counts,  # [..., 2]
    p_slopes,
    p_seed,
    p_starts_q,
    p_starts_k,
    q_strides,
    k_strides,
    v_strides,
    t_q_strides,
    t_k_strides,
    t_v_strides,
    o_strides,
    max_strides,
    t_o_strides,
    mu_strides,
    mask_strides,
    t_mask_strides,
    list_strides,  # of batch, head, query block
    heads,
    batch_heads,
    group,
    section,
    tokens_q,
    tokens_k,
    seq_q,
    seq_k,
    left,
    right,
    seed_batch,
    threshold,
    scale: "fp64",
    cap_scale: "fp64",
    cap: "fp64",
    keep_scale: "fp64",
    SHAPE: tl.constexpr,  # D, Dv, both rounded up, rows and columns of the tile
    FLAGS: tl.constexpr,
):
    # ids
    HEAD_DIM: tl.constexpr = SHAPE[0]
    HEAD_DIM_V: tl.constexpr = SHAPE[1]
    BLOCK_D: tl.constexpr = SHAPE[2]
    BLOCK_DV: tl.constexpr = SHAPE[3]
    BLOCK_Q: tl.constexpr = SHAPE[4]
    BLOCK_K: tl.constexpr = SHAPE[5]
    ACC: tl.constexpr = p_max.dtype.element_ty
    blocks = tl.cdiv(seq_q, BLOCK_Q)
    key_blocks = tl.cdiv(seq_k, BLOCK_K)
    i_block, i_h, i_b = primitives.scheduled_block(blocks, heads, batch_heads, section, True)
    i_b64, i_h64, i_hk64 = i_b.to(tl.int64), i_h.to(tl.int64), (i_h // group).to(tl.int64)
    start_q, seq_q = primitives.sequence(p_starts_q, i_b, tokens_q, seq_q, FLAGS)
    start_k, seq_k = primitives.sequence(p_starts_k, i_b, tokens_k, seq_k, FLAGS)
    i_first = i_block * BLOCK_Q
    if flags.VARLEN & FLAGS:
        if i_first >= seq_q:
            return
        i_b64 = i_b64 * 0
    o_q = i_first + tl.arange(0, BLOCK_Q)

    # this program's tensors
    p_q += i_b64 * q_strides[0] + i_h64 * q_strides[1] + start_q * q_strides[2]
    p_k = primitives.head_pointer(p_k, i_b64, i_hk64, start_k, k_strides, FLAGS)
    p_v = primitives.head_pointer(p_v, i_b64, i_hk64, start_k, v_strides, FLAGS)
    if flags.T_KEY & FLAGS:
        p_t_k = primitives.head_pointer(p_t_k, i_b64, i_hk64, start_k, t_k_strides, FLAGS)
    if flags.T_VALUE & FLAGS:
        p_t_v = primitives.head_pointer(p_t_v, i_b64, i_hk64, start_k, t_v_strides, FLAGS)
    p_o += i_b64 * o_strides[0] + i_h64 * o_strides[1] + start_q * o_strides[2]
    row = i_b64 * max_strides[0] + i_h64 * max_strides[1] + start_q
    p_t_o += i_b64 * t_o_strides[0] + i_h64 * t_o_strides[1] + start_q * t_o_strides[2]
    p_mu += i_b64 * mu_strides[0] + i_h64 * mu_strides[1] + start_q
    scale = primitives.scalar(scale, ACC)
    cap_scale = primitives.scalar(cap_scale, ACC)
    cap = primitives.scalar(cap, ACC)
    slope = 0.0
    if flags.ALIBI & FLAGS:
        slope = tl.load(p_slopes + i_b * heads + i_h)
    seed = primitives.dropout_seed(p_seed, i_b, seed_batch, FLAGS)
    if flags.MASKED & FLAGS:
        p_mask += i_b64 * mask_strides[0] + i_h64 * mask_strides[1]
        i_list = i_b64 * list_strides[0] + i_h64 * list_strides[1] + i_block * list_strides[2]
        p_counts += i_list * 2
        p_lists += i_list * 2 * key_blocks
    if flags.T_MASK & FLAGS:
        p_t_mask += i_b64 * t_mask_strides[0] + i_h64 * t_mask_strides[1]

    # prologue
    q = primitives.load_rows(p_q, o_q, q_strides[2], seq_q, HEAD_DIM, BLOCK_D, True, FLAGS)
    t_q = q
    if flags.T_QUERY & FLAGS:
        p_t_q += i_b64 * t_q_strides[0] + i_h64 * t_q_strides[1] + start_q * t_q_strides[2]
        t_q = primitives.load_rows(
            p_t_q, o_q, t_q_strides[2], seq_q, HEAD_DIM, BLOCK_D, True, FLAGS
        )
    softmax = load_softmax(p_max + row, p_log_sum + row, o_q, seq_q)
    if flags.MAY_BE_EMPTY & FLAGS:
        q = primitives.clear_rows(q, softmax[0] != float("inf"))
        t_q = primitives.clear_rows(t_q, softmax[0] != float("inf"))
    t_acc = tl.zeros((BLOCK_Q, BLOCK_DV), ACC)
    mu = tl.zeros((BLOCK_Q,), ACC)
    args = (
        q,
        t_q,
        softmax,
        i_first,
        i_b,
        i_h,
        i_h // group,
        p_k,
        p_v,
        p_t_k,
        p_t_v,
        p_mask,
        p_t_mask,
        k_strides[2],
        v_strides[2],
        t_k_strides,
        t_v_strides,
        mask_strides,
        t_mask_strides,
        seq_q,
        seq_k,
        left,
        right,
        scale,
        cap_scale,
        cap,
        slope,
        seed,
        threshold,
    )

    # main loops
    if flags.MASKED & FLAGS:
        for n in range(0, tl.load(p_counts)):
            j_first = tl.load(p_lists + n) * BLOCK_K
            t_acc, mu = _jvp_step(t_acc, mu, j_first, *args, SHAPE, ACC, True, FLAGS)
        if flags.BOOL_MASK & FLAGS:
            for n in range(0, tl.load(p_counts + 1)):
                j_first = tl.load(p_lists + key_blocks + n) * BLOCK_K
                t_acc, mu = _jvp_step(t_acc, mu, j_first, *args, SHAPE, ACC, False, FLAGS)
    else:
        lo, full_lo, full_hi, hi = primitives.key_range(
            i_first, seq_q, seq_k, left, right, BLOCK_Q, BLOCK_K, FLAGS
        )
        if flags.WINDOW_LEFT & FLAGS:
            for j_first in range(lo, full_lo, BLOCK_K):
                t_acc, mu = _jvp_step(t_acc, mu, j_first, *args, SHAPE, ACC, True, FLAGS)
        for j_first in range(full_lo, full_hi, BLOCK_K):
            j_first = tl.multiple_of(j_first, BLOCK_K)
            t_acc, mu = _jvp_step(t_acc, mu, j_first, *args, SHAPE, ACC, False, FLAGS)
        for j_first in range(full_hi, hi, BLOCK_K):
            t_acc, mu = _jvp_step(t_acc, mu, j_first, *args, SHAPE, ACC, True, FLAGS)

    # epilogue
    if flags.DROPOUT & FLAGS:
        t_acc *= primitives.scalar(keep_scale, ACC)
    if flags.T_SCORES & FLAGS:
        o = primitives.load_rows(p_o, o_q, o_strides[2], seq_q, HEAD_DIM_V, BLOCK_DV, True, FLAGS)
        t_acc -= mu[:, None] * o.to(ACC)  # E12
    primitives.store_rows(p_t_o, o_q, t_acc, t_o_strides[2], seq_q, HEAD_DIM_V, BLOCK_DV, FLAGS)
    tl.store(p_mu + o_q, mu, mask=o_q < seq_q)
