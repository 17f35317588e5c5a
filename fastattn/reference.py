"""The oracle: every equation of DESIGN.md in plain torch, O(S²) memory, any dtype and device.

The functions compute in float32 (float64 for float64) and return the inputs' dtype. ``attention``,
``linear_relu`` and
``mlp`` are differentiable by autograd any number of times; the ``*_forward`` and ``*_backward``
pairs write the
first-order formulas out and are what the kernels are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- dropout --------------------------------------------------------------------------------------


def philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC'11) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and low words of x * factor, by 16-bit halves as int64 is signed."""
    low = x * (factor & 0xFFFF)
    high = x * (factor >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_keep_mask(
    seed: Tensor, batch: int, heads: int, seq_q: int, seq_k: int, p: float, device: torch.device
) -> Tensor:
    """The dropout keep-mask, bool ``[batch, heads, seq_q, seq_k]``, of an int64 one-element
    ``seed``."""

    def axis(n: int, dim: int) -> Tensor:
        return torch.arange(n, device=device).view([-1 if d == dim else 1 for d in range(4)])

    columns = axis(seq_k, 3)
    seed = seed.to(device).reshape(())
    key = (seed & _WORD, (seed >> 32) & _WORD)
    counter = torch.broadcast_tensors(columns // 4, axis(seq_q, 2), axis(heads, 1), axis(batch, 0))
    words = torch.stack(philox(counter, key))
    word = words.gather(0, (columns % 4).expand(1, batch, heads, seq_q, seq_k))[0]
    return word >= math.floor(p * 2**32)


# --- attention ------------------------------------------------------------------------------------


def _grouped(heads_q: int, x: Tensor) -> Tensor:
    """Repeats the key heads ``[*, Hk, S, D]`` for the query heads that share them."""
    if x.dim() < 3 or x.shape[-3] == heads_q:
        return x
    return x.repeat_interleave(heads_q // x.shape[-3], dim=-3)


def _scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size: tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores S, the softcap's derivative, and which (i, j) are visible, ``[*, Hq, Sq,
    Sk]``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seq_q, seq_k = query.shape[-2], key.shape[-2]
    s = scale * (query @ key.transpose(-1, -2))  # E1
    slope = torch.ones_like(s)
    if softcap > 0.0:
        capped = torch.tanh(s / softcap)
        s, slope = softcap * capped, 1 - capped * capped
    i = torch.arange(seq_q, device=s.device)[:, None]
    j = torch.arange(seq_k, device=s.device)[None, :]
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(s.dtype)
        if slopes.dim() == 2:
            slopes = slopes.view(slopes.shape[0], *[1] * (s.dim() - 4), slopes.shape[1])
        s = s - slopes[..., None, None] * (i - j).abs()
    visible = torch.ones((seq_q, seq_k), dtype=torch.bool, device=s.device)
    if is_causal:
        visible = visible & (j <= i)
    if window_size is not None:
        left, right = window_size
        if left >= 0:
            visible = visible & (j >= i - left)
        if right >= 0:
            visible = visible & (j <= i + right)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            visible = visible & (attn_mask != -math.inf)
            s = s + torch.where(attn_mask == -math.inf, 0.0, attn_mask).to(s.dtype)
    visible = visible.expand(s.shape)
    return torch.where(visible, s, -math.inf), slope, visible


def _hide(x: Tensor, used: Tensor) -> Tensor:
    """Clears the rows of x that nobody uses, so that not even a NaN in them gets out."""
    return torch.where(used[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def _probabilities(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, options: dict
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """P, LSE, the softcap's derivative, and q, k, v in the accumulator's type without unused
    rows."""
    heads = query.shape[-3] if query.dim() > 2 else 1
    dtype = _accumulator(query.dtype)
    q = query.to(dtype)
    k, v = _grouped(heads, key.to(dtype)), _grouped(heads, value.to(dtype))
    mask = attn_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    with torch.no_grad():
        visible = _scores(q, k, mask, **options)[2]
    k, v = _hide(k, visible.any(-2)), _hide(v, visible.any(-2))
    q = _hide(q, visible.any(-1))
    s, slope, _ = _scores(q, k, mask, **options)
    empty = ~visible.any(-1, keepdim=True)
    finite = torch.where(empty, 0.0, s)
    m = torch.where(visible, finite, -math.inf).amax(-1, keepdim=True) if s.shape[-1] else None
    if m is None:
        return s, s.new_full(s.shape[:-1], -math.inf), slope, (q, k, v)
    m = torch.where(empty, 0.0, m).detach()
    weights = torch.where(visible, torch.exp(finite - m), 0.0)  # E3
    total = weights.sum(-1, keepdim=True)
    p = weights / torch.where(empty, 1.0, total)  # E5, E6
    lse = torch.where(empty, -math.inf, m + torch.log(torch.where(empty, 1.0, total)))[..., 0]
    return p, lse, slope, (q, k, v)


def _keep(p: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    """Z: the keep-mask divided by 1 - p, in p's shape ``[*, Hq, Sq, Sk]``; None without dropout."""
    if dropout_p == 0.0 or seed is None:
        return None
    seq_q, seq_k = p.shape[-2:]
    heads = p.shape[-3] if p.dim() > 2 else 1
    batch = math.prod(p.shape[:-3])
    keep = philox_keep_mask(seed, batch, heads, seq_q, seq_k, dropout_p, p.device)
    return keep.reshape(p.shape).to(p.dtype) / (1.0 - dropout_p)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention, E1-E5, differentiable by autograd.

    query ``[*, Hq, Sq, D]``, key ``[*, Hk, Sk, D]``, value ``[*, Hk, Sk, Dv]``, attn_mask bool or
    float, broadcastable
    to ``[*, Hq, Sq, Sk]`` -> out ``[*, Hq, Sq, Dv]`` in query's dtype, LSE ``[*, Hq, Sq]`` in
    float32 (float64).
    """
    options = {
        "is_causal": is_causal,
        "scale": scale,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }
    p, lse, _, (_, _, v) = _probabilities(query, key, value, attn_mask, options)
    z = _keep(p, seed, dropout_p)
    out = (p if z is None else z * p) @ v  # E4
    return out.to(query.dtype), lse


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """``attention`` without a graph."""
    with torch.no_grad():
        return attention(query, key, value, attn_mask, **options)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    seed: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of query, key, value and the float mask, E6-E11; None for one that is not
    needed."""
    options = {
        "is_causal": is_causal,
        "scale": scale,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }
    with torch.no_grad():
        p, _, slope, (q, k, v) = _probabilities(query, key, value, attn_mask, options)
        z = _keep(p, seed, dropout_p)
        empty = lse == -math.inf
        do = _hide(grad_out.to(p.dtype), ~empty)
        delta = (do * out.to(p.dtype)).sum(-1)  # E6
        if grad_lse is not None:
            delta = delta - torch.where(empty, 0.0, grad_lse.to(p.dtype))
        dp = do @ v.transpose(-1, -2)  # E7
        dp = dp if z is None else z * dp
        ds = p * (dp - delta[..., None])
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        dt = scale * ds * slope
        dq = dt @ k  # E8
        dk = dt.transpose(-1, -2) @ q  # E9
        dv = (p if z is None else z * p).transpose(-1, -2) @ do  # E10
        dk, dv = _sum_groups(dk, key), _sum_groups(dv, value)
        dmask = None
        if needs[3] and attn_mask is not None and attn_mask.dtype != torch.bool:
            dmask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype)  # E11
        grads = (dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype))
    return (*(g if need else None for g, need in zip(grads, needs, strict=False)), dmask)


def _sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    if grad.shape == like.shape:
        return grad
    return grad.unflatten(-3, (like.shape[-3], -1)).sum(-3)


def attention_weights(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, **options
) -> Tensor:
    """P of E6, ``[*, Hq, Sq, Sk]``: the softmax before dropout."""
    defaults = {
        "is_causal": False,
        "scale": None,
        "window_size": None,
        "softcap": 0.0,
        "alibi_slopes": None,
    }
    return _probabilities(query, key, key, attn_mask, defaults | options)[0].to(query.dtype)


# --- linear, ReLU ---------------------------------------------------------------------------------


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(x Wᵀ + b), E15: input ``[*, K]``, weight ``[N, K]``, bias ``[N]`` -> ``[*, N]``."""
    return torch.relu(torch.nn.functional.linear(input, weight, bias))


def linear_relu_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output and R of E15, bool ``[*, N]``: not (output <= 0), so that a NaN passes its
    gradient."""
    with torch.no_grad():
        out = linear_relu(input, weight, bias)
        return out, ~(out <= 0)


def linear_relu_backward(
    grad_out: Tensor, input: Tensor, weight: Tensor, passes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias, E16."""
    with torch.no_grad():
        g = torch.where(passes, grad_out, 0.0)
        rows = g.reshape(math.prod(g.shape[:-1]), g.shape[-1])
        return g @ weight, rows.T @ input.reshape(rows.shape[0], input.shape[-1]), rows.sum(0)


def mlp(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Linear-ReLU-...-Linear, no ReLU after the last: weights ``[N_l, N_{l-1}]``, biases ``[N_l]``
    or None."""
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        input = linear_relu(input, weight, bias)
    return torch.nn.functional.linear(input, weights[-1], biases[-1])
