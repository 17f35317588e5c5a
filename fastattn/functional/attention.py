"""Softmax attention: the user's function and its autograd Function."""

from __future__ import annotations

import functools
import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from fastattn import backends, ops, reference
from fastattn.functional import _batching, _validate
from fastattn.functional._autograd import (
    apply,
    autocast,
    kernel,
    save_for_forward,
)
from fastattn.functional._broadcast import broadcast, padded_head_dim
from fastattn.functional.attention_derivatives import Point, refuse_slopes
from fastattn.ops import Cotangents, Extras, Inputs, Results, Tangents, split


class AttentionFunction(torch.autograd.Function):
    """Softmax attention by the kernels, as an autograd Function.

    The first two results, out and lse, can be differentiated any number of times in every mode; the
    other two are for the derivatives. ``apply`` checks nothing that a kernel does not check.
    Saves query, key, value, the mask, the seed and all results but the LSE: O(S) memory.

    Args of ``apply``, all by position:
        call: a ``fastattn.ops.Call``: the options (scale, dropout_p, ...) and whose kernels.
        query: ``[*, Hq, Sq, D]``.
        key: ``[*, Hk, Sk, D]``, Hk a divisor of Hq.
        value: ``[*, Hk, Sk, Dv]``.
        attn_mask: None, bool (True = attend) or of query's dtype; query's rank, each extent that
            of ``[*, Hq, Sq, Sk]`` or 1.
        slopes: None or ALiBi's slopes, ``[Hq]`` or ``[n, Hq]``; they get no gradient.
        seed: None or dropout's seeds, int64 ``[n]``, n a divisor of the batch.
        starts_q: None or where packed sequences start, int32 or int64 ``[B + 1]``; query is then
            ``[1, Hq, tokens, D]`` and attn_mask None.
        starts_k: the same of key and value.

    Returns:
        out ``[*, Hq, Sq, Dv]`` in query's dtype; lse, row_max and log_sum ``[*, Hq, Sq]`` in
        float32 (float64 for float64).

    Raises:
        RuntimeError: a kernel refuses an argument, or the slopes are to be differentiated.

    The online softmax is that of Milakov and Gimelshein 2018 (arXiv 1805.02867), the backward that
    of FlashAttention-2 (Dao 2023, arXiv 2307.08691).

    >>> import torch
    >>> from fastattn.functional import AttentionFunction
    >>> from fastattn.ops import Call, Options
    >>> query, key, value = torch.randn(3, 2, 4, 16, 8)
    >>> call = Call(Options(is_causal=True, scale=8**-0.5))
    >>> out, lse, *_ = AttentionFunction.apply(call, query, key, value, *[None] * 5)
    >>> out.shape, lse.shape
    (torch.Size([2, 4, 16, 8]), torch.Size([2, 4, 16]))
    """

    @staticmethod
    def forward(call, query, key, value, attn_mask, slopes, seed, starts_q, starts_k):
        inputs = Inputs(query, key, value, attn_mask)
        extras = Extras(slopes, seed, starts_q, starts_k)
        return kernel(ops.attention_forward, inputs, extras, call.options, call.backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        out, _, *softmax = output
        ctx.mark_non_differentiable(*softmax)
        tensors = (*tensors, out, *softmax)
        ctx.save_for_backward(*tensors)
        save_for_forward(ctx, *tensors)

    @staticmethod
    def backward(ctx, grad_out, grad_lse, *_):
        _, *asked = ctx.needs_input_grad
        refuse_slopes(asked[4], "gradient")
        point = Point(ctx.call, *split(ctx.saved_tensors, Inputs, Extras, Results))
        return (None, *point.gradients(Cotangents(grad_out, grad_lse), asked[:4]), *(None,) * 4)

    @staticmethod
    def jvp(ctx, _call, *directions):
        tangents, of_extras = split(directions, Tangents, Extras)
        refuse_slopes(of_extras.slopes is not None, "tangent")
        point = Point(ctx.call, *split(ctx.saved_tensors, Inputs, Extras, Results))
        return *point.tangents_of_results(tangents), None, None

    @staticmethod
    def vmap(info, in_dims, call, *tensors):
        return _batching.attention(
            functools.partial(AttentionFunction.apply, call),
            info.batch_size,
            tensors,
            in_dims[1:],
            _batching.FORWARD,
            whole_mask=False,
        )


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window_size: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window_size: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window_size: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    return_lse: bool = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · Q Kᵀ + mask) V, ``[..., H, Sq, Dv]``.

    The positional arguments are those of ``torch.nn.functional.scaled_dot_product_attention``, with
    their meaning. Differentiable any number of times, in every mode, in O(S) memory.

    Args:
        query: ``[..., Hq, Sq, D]``, floating point.
        key: ``[..., Hk, Sk, D]``. The dimensions before the last two of query, key and value
            broadcast, heads too. One dtype for the three; under autocast any, and they are cast.
        value: ``[..., Hv, Sk, Dv]``.
        attn_mask: bool (True = attend) or float (added to the scores), broadcastable to
            ``[..., H, Sq, Sk]``. A float mask may require grad.
            ``torch.nn.attention.bias.causal_lower_right`` is accepted.
        dropout_p: probability in [0, 1] of dropping an attention weight; applied whenever it is
            positive. The keep-mask is Philox4x32-10 (Salmon et al. 2011) of a seed that is drawn
            from torch's generator.
        is_causal: query i sees keys j <= i (top-left aligned). Together with attn_mask: both.
        scale: finite; ``1/sqrt(D)`` by default.
        enable_gqa: allow Hk and Hv to be divisors of Hq, each head serving Hq/Hk neighbours.
        window_size: ``(left, right)``, in keys: query i sees i-left <= j <= i+right; -1 is
            unbounded.
        softcap: c > 0 turns a score s into c·tanh(s/c) before the mask (Gemma 2, arXiv 2408.00118);
            0 and None do not.
        alibi_slopes: ``[H]`` or ``[B, H]``: adds -slope·|i-j| to the scores (ALiBi, Press et al.
            2021, arXiv 2108.12409).
        return_lse: also return the log-sum-exp of each row.
        backend: ``cpu``, ``cuda``, ``triton``, ``reference``, or None for the first that serves the
            call; ``fastattn.backends.explain`` says which that is.

    Returns:
        ``[..., H, Sq, Dv]`` in query's dtype. With ``return_lse`` also the LSE, ``[..., H, Sq]``,
        natural logarithm, float32 (float64 for float64), differentiable. A row with nothing to
        attend to is 0, its LSE -inf, its gradients 0.

    Raises:
        ValueError: a shape, device or number that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: ``backend`` names one that cannot serve the call.

    >>> import torch, fastattn
    >>> query, key, value = torch.randn(3, 2, 8, 16, 64)
    >>> out, lse = fastattn.scaled_dot_product_attention(
    ...     query, key, value, is_causal=True, window_size=(4, 0), return_lse=True
    ... )
    >>> out.shape, lse.shape
    (torch.Size([2, 8, 16, 64]), torch.Size([2, 8, 16]))
    """
    _validate.tensor("query", query)
    query, key, value = autocast(query, key, value)
    _validate.attention(query, key, value, enable_gqa)
    dropout_p = _validate.probability("dropout_p", dropout_p)
    window_size, softcap = _validate.window(window_size), _validate.softcap(softcap)
    if scale is None:
        scale = 1.0 / math.sqrt(max(1, query.shape[-1]))
    scale = _validate.number("scale", scale)
    unbatched = query.dim() == key.dim() == value.dim() == 2
    query, key, value = broadcast(query, key, value, enable_gqa)
    query, key = padded_head_dim(query, key)
    if alibi_slopes is not None:
        batch = query.shape[0] if query.dim() > 3 else None
        _validate.slopes(alibi_slopes, query, batch)
    if attn_mask is not None:
        attn_mask, is_causal = _prepare_mask(attn_mask, is_causal, query, key)

    problem = backends.attention_problem(
        "attention",
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    chosen = backends.select(problem, backend)
    drops_all, seed = dropout_p == 1.0, None
    if drops_all:
        dropout_p = 0.0
    elif dropout_p > 0.0:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    if chosen == "reference":
        out, lse = reference.attention(
            query,
            key,
            value,
            attn_mask,
            seed=seed,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
        )
    else:
        options = ops.Options(is_causal, scale, dropout_p, *window_size, softcap)
        call = ops.Call(options, backends.kernels_of(chosen))
        out, lse, *_ = apply(
            AttentionFunction, call, query, key, value, attn_mask, alibi_slopes, seed, None, None
        )
    if drops_all:
        out = out * 0.0  # not a new tensor: NaN stays, and the gradients are 0, as in torch
    if unbatched:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def _prepare_mask(
    mask: Tensor, is_causal: bool, query: Tensor, key: Tensor
) -> tuple[Tensor | None, bool]:
    """The mask with query's rank and a kernel's dtype, and whether the call is causal."""
    seq_q, seq_k = query.shape[-2], key.shape[-2]
    if isinstance(mask, CausalBias):
        if (mask.seq_len_q, mask.seq_len_kv) != (seq_q, seq_k):
            raise ValueError(
                f"attn_mask: expected a causal bias of ({seq_q}, {seq_k}), "
                f"got ({mask.seq_len_q}, {mask.seq_len_kv})"
            )
        if mask.variant == CausalVariant.UPPER_LEFT or seq_q == seq_k:
            return None, True
        mask = torch.ones((seq_q, seq_k), dtype=torch.bool, device=query.device).tril(seq_k - seq_q)
    _validate.attn_mask(mask, query, (*query.shape[:-1], seq_k))
    mask = mask[(None,) * (query.dim() - mask.dim())]
    if mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return mask, is_causal
