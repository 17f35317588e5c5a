"""Softmax attention, E1-E14, in O(S²) memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn._call import Extras, Inputs, Options
from fastattn.reference.philox import philox_keep_mask


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(query: Tensor, x: Tensor) -> Tensor:
    """Repeats the key heads ``[*, Hk, S, D]`` for the query heads that share them."""
    if x.dim() < 3 or x.shape[-3] == query.shape[-3]:
        return x
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3)


@dataclass(frozen=True)
class Setting:
    """What an attention call has besides its inputs, and which rows of a larger call these are.

    >>> query = torch.randn(2, 4, 16, 64)
    >>> Setting.of(query, is_causal=True).options.scale  # 1 / sqrt(64)
    0.125
    """

    options: Options
    extras: Extras
    first_row: int = 0  # query's first row is this row of a longer one
    first_batch: int = 0  # and its first batch element this one of the seed's

    @classmethod
    def of(
        cls,
        query: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        window_size: tuple[int, int] | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        seed: Tensor | None = None,
        first_row: int = 0,
        first_batch: int = 0,
    ) -> Setting:
        """From the options of ``fastattn.reference``, and the place of the first row and of the
        first batch element in a larger call."""
        scale = max(1, query.shape[-1]) ** -0.5 if scale is None else scale
        options = Options(is_causal, scale, dropout_p, *(window_size or (-1, -1)), softcap)
        return cls(options, Extras(alibi_slopes, seed), first_row, first_batch)


def _scores(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, call: Setting
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores S, the softcap's tanh (0 without it), and which (i, j) are visible, ``[*, Hq,
    Sq, Sk]``."""
    seq_q, seq_k = query.shape[-2], key.shape[-2]
    s = call.options.scale * (query @ key.transpose(-1, -2))  # E1
    capped = torch.zeros_like(s)
    if call.options.softcap > 0.0:
        capped = torch.tanh(s / call.options.softcap)
        s = call.options.softcap * capped
    first = call.first_row
    i = torch.arange(first, first + seq_q, device=s.device)[:, None]
    j = torch.arange(seq_k, device=s.device)[None, :]
    if call.extras.slopes is not None:
        slopes = call.extras.slopes.to(s.dtype)
        if slopes.dim() == 2:
            each = math.prod(s.shape[:-3]) // max(1, slopes.shape[0])
            slopes = slopes.repeat_interleave(each, 0).reshape(s.shape[:-2])
        s = s - slopes[..., None, None] * (i - j).abs()
    visible = torch.ones((seq_q, seq_k), dtype=torch.bool, device=s.device)
    if call.options.is_causal:
        visible = visible & (j <= i)
    if call.options.left >= 0:
        visible = visible & (j >= i - call.options.left)
    if call.options.right >= 0:
        visible = visible & (j <= i + call.options.right)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            visible = visible & (attn_mask != -math.inf)
            s = s + torch.where(attn_mask == -math.inf, 0.0, attn_mask).to(s.dtype)
    visible = visible.expand(s.shape)
    return torch.where(visible, s, -math.inf), capped, visible


def _hide(x: Tensor, used: Tensor) -> Tensor:
    """x with its unused rows at 0, so that a NaN in them reaches no result."""
    return torch.where(used[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))


class Weights(NamedTuple):
    """What the formulas are made of, in the accumulator's type."""

    p: Tensor  # [*, Hq, Sq, Sk]  E6
    lse: Tensor  # [*, Hq, Sq]
    capped: Tensor  # [*, Hq, Sq, Sk], the softcap's tanh
    visible: Tensor  # bool [*, Hq, Sq, Sk]
    q: Tensor  # [*, Hq, Sq, D], unused rows at 0, as in k and v
    k: Tensor  # [*, Hq, Sk, D]
    v: Tensor  # [*, Hq, Sk, Dv]

    def keys(self, x: Tensor) -> Tensor:
        """x of the keys ``[*, Hk, Sk, dim]`` as k and v are here."""
        return _hide(_grouped(self.k, x.to(self.p.dtype)), self.visible.any(-2))

    def queries(self, x: Tensor) -> Tensor:
        """x of the queries ``[*, Hq, Sq, dim]`` as q is here."""
        return _hide(x.to(self.p.dtype), self.visible.any(-1))


def weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, call: Setting
) -> Weights:
    """P and what it is made of, differentiable."""
    dtype = _accumulator(query.dtype)
    q = query.to(dtype)
    k, v = _grouped(query, key.to(dtype)), _grouped(query, value.to(dtype))
    mask = attn_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    with torch.no_grad():
        visible = _scores(q, k, mask, call)[2]
    k, v = _hide(k, visible.any(-2)), _hide(v, visible.any(-2))
    q = _hide(q, visible.any(-1))
    s, capped, _ = _scores(q, k, mask, call)
    if s.shape[-1] == 0:
        return Weights(s, s.new_full(s.shape[:-1], -math.inf), capped, visible, q, k, v)
    empty = ~visible.any(-1, keepdim=True)
    finite = torch.where(empty, 0.0, s)
    m = torch.where(visible, finite, -math.inf).amax(-1, keepdim=True)
    m = torch.where(empty, 0.0, m).detach()
    powers = torch.where(visible, torch.exp(finite - m), 0.0)  # E3
    total = powers.sum(-1, keepdim=True)
    p = powers / torch.where(empty, 1.0, total)  # E5, E6
    lse = torch.where(empty, -math.inf, m + torch.log(torch.where(empty, 1.0, total)))[..., 0]
    return Weights(p, lse, capped, visible, q, k, v)


def dropped(p: Tensor, call: Setting) -> Tensor:
    """Z∘p, p ``[*, Hq, Sq, Sk]``: Z is the keep-mask divided by 1 - dropout_p."""
    if call.options.dropout_p == 0.0 or call.extras.seed is None:
        return p
    batch, heads = math.prod(p.shape[:-3]), p.shape[-3] if p.dim() > 2 else 1
    rows, keys = p.shape[-2:]
    keep = philox_keep_mask(
        call.extras.seed, batch, heads, rows, keys, call.options.dropout_p, p.device,
        call.first_row, call.first_batch,
    )  # fmt: skip
    return p * (keep.reshape(p.shape).to(p.dtype) / (1.0 - call.options.dropout_p))


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """Softmax attention, E1-E5, differentiable by autograd any number of times.

    Args:
        query, key, value, attn_mask, options: see ``fastattn.reference``.

    Returns:
        out ``[*, Hq, Sq, Dv]`` in query's dtype, LSE ``[*, Hq, Sq]`` in float32 (float64).

    >>> query, key, value = torch.randn(3, 2, 4, 16, 8)
    >>> expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    >>> torch.allclose(attention(query, key, value)[0], expected, atol=1e-5)
    True
    """
    inputs = Inputs(query, key, value, attn_mask)
    return attention_in(inputs, Setting.of(query, **options))


def attention_in(inputs: Inputs, call: Setting) -> tuple[Tensor, Tensor]:
    """``attention`` of inputs and a Setting, as the kernels take them, but for packed sequences.

    >>> inputs = Inputs(*torch.randn(3, 2, 4, 16, 8))
    >>> attention_in(inputs, Setting.of(inputs.query, is_causal=True))[0].shape
    torch.Size([2, 4, 16, 8])
    """
    w = weights(*inputs, call)
    out = dropped(w.p, call) @ w.v  # E4
    return out.to(inputs.query.dtype), w.lse


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """``attention`` without a graph.

    >>> attention_forward(*torch.randn(3, 2, 4, 16, 8, requires_grad=True))[0].requires_grad
    False
    """
    with torch.no_grad():
        return attention(query, key, value, attn_mask, **options)


def _delta(w: Weights, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor) -> Tensor:
    """Δ ``[*, Hq, Sq, 1]`` of E6."""
    delta = (grad_out * out.to(w.p.dtype)).sum(-1)
    if grad_lse is not None:
        empty = ~w.visible.any(-1)
        delta = delta - torch.where(empty, 0.0, grad_lse.to(w.p.dtype))
    return delta[..., None]


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
    needs: Sequence[bool] = (True, True, True, True),
    **options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of query, key, value and the float mask, E6-E11.

    Args:
        grad_out, grad_lse, query, key, value, attn_mask, needs, options: see
            ``fastattn.reference``.
        out: the forward's output, of which Δ is made.
        lse: the forward's LSE; not read, since P is computed from the inputs.

    Returns:
        The four gradients in their tensors' shapes and dtypes; None for one that is not needed.
    """
    call = Setting.of(query, **options)
    with torch.no_grad():
        w = weights(query, key, value, attn_mask, call)
        do = w.queries(grad_out)
        dp = dropped(do @ w.v.transpose(-1, -2), call)  # E7
        ds = w.p * (dp - _delta(w, do, grad_lse, out))
        dt = call.options.scale * ds * (1 - w.capped**2)
        dq = dt @ w.k  # E8
        dk = dt.transpose(-1, -2) @ w.q  # E9
        dv = dropped(w.p, call).transpose(-1, -2) @ do  # E10
        return _gradients(dq, dk, dv, ds, query, key, value, attn_mask, needs)


def _gradients(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    ds: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """In the shapes and dtypes of what they are the gradients of; None for one that is not
    needed."""

    def like(grad: Tensor, x: Tensor) -> Tensor:
        if grad.shape != x.shape:
            grad = grad.unflatten(-3, (x.shape[-3], -1)).sum(-3)
        return grad.to(x.dtype)

    dmask = None
    if needs[3] and attn_mask is not None and attn_mask.dtype != torch.bool:
        dmask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype)  # E11
    return (
        like(dq, query) if needs[0] else None,
        like(dk, key) if needs[1] else None,
        like(dv, value) if needs[2] else None,
        dmask,
    )


def _tangent_of_scores(
    w: Weights, query: Tensor, tangents: Sequence[Tensor | None], call: Setting
) -> tuple[Tensor, Tensor]:
    """The tangents ``[*, Hq, Sq, Sk]`` of the scores, A of E12, and of what the softcap takes."""
    t_query, t_key, _, t_mask = tangents
    before = torch.zeros_like(w.p)
    if t_query is not None:
        before = before + w.queries(t_query) @ w.k.transpose(-1, -2)
    if t_key is not None:
        before = before + w.q @ w.keys(t_key).transpose(-1, -2)
    before = call.options.scale * before
    a = before * (1 - w.capped**2)
    if t_mask is not None:
        a = a + torch.where(w.visible, t_mask.to(w.p.dtype), 0.0)
    return a, before


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    tangents: Sequence[Tensor | None],
    **options,
) -> tuple[Tensor, Tensor]:
    """The tangents of the output and of the LSE, E12: ``[*, Hq, Sq, Dv]`` and ``[*, Hq, Sq]``.

    Args:
        query, key, value, attn_mask, tangents, options: see ``fastattn.reference``.
    """
    call = Setting.of(query, **options)
    with torch.no_grad():
        w = weights(query, key, value, attn_mask, call)
        a, _ = _tangent_of_scores(w, query, tangents, call)
        mu = (w.p * a).sum(-1, keepdim=True)
        t_out = dropped(w.p * (a - mu), call) @ w.v
        if tangents[2] is not None:
            t_out = t_out + dropped(w.p, call) @ w.keys(tangents[2])
        return t_out.to(query.dtype), mu[..., 0]


def attention_double_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    tangents: Sequence[Tensor | None],
    *,
    needs: Sequence[bool] = (True, True, True, True),
    **options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The derivatives of attention_backward's results in the direction ``tangents``, E13 and E14.

    As the second derivative is symmetric, they are also the gradients of the product of these
    results with ``tangents``.

    Args:
        grad_out, grad_lse, query, key, value, attn_mask, tangents, needs, options: see
            ``fastattn.reference``.

    Returns:
        Four tensors in the shapes of the inputs; None for one that is not needed.
    """
    t_out, _ = attention_jvp(query, key, value, attn_mask, tangents, **options)
    call = Setting.of(query, **options)
    with torch.no_grad():
        w = weights(query, key, value, attn_mask, call)
        a, before = _tangent_of_scores(w, query, tangents, call)
        do = w.queries(grad_out)
        mu = (w.p * a).sum(-1, keepdim=True)
        g = dropped(do @ w.v.transpose(-1, -2), call)
        h = torch.zeros_like(g)
        if tangents[2] is not None:
            h = dropped(do @ w.keys(tangents[2]).transpose(-1, -2), call)
        out = dropped(w.p, call) @ w.v
        g = g - _delta(w, do, grad_lse, out)
        beta = (do * t_out).sum(-1, keepdim=True)
        ds = w.p * g
        e = w.p * ((a - mu) * g + h - beta)  # E14, W - B
        slope, scale = 1 - w.capped**2, call.options.scale
        cap = call.options.softcap or 1.0
        ds_before = scale * slope * ds
        e_before = scale * slope * (e - 2 * w.capped / cap * before * ds)
        gq, gk = e_before @ w.k, e_before.transpose(-1, -2) @ w.q
        if tangents[1] is not None:
            gq = gq + ds_before @ w.keys(tangents[1])
        if tangents[0] is not None:
            gk = gk + ds_before.transpose(-1, -2) @ w.queries(tangents[0])
        gv = dropped(w.p * (a - mu), call).transpose(-1, -2) @ do
        return _gradients(gq, gk, gv, e, query, key, value, attn_mask, needs)


def attention_weights(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, **options
) -> Tensor:
    """P of E6, ``[*, Hq, Sq, Sk]``: the softmax before dropout.

    >>> weights = attention_weights(*torch.randn(2, 1, 2, 3, 8), is_causal=True)
    >>> weights.shape, weights[0, 0, 0].tolist()
    (torch.Size([1, 2, 3, 3]), [1.0, 0.0, 0.0])
    """
    return weights(query, key, key, attn_mask, Setting.of(query, **options)).p.to(query.dtype)
