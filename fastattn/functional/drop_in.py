"""Calls that stand in for torch's own: a kernel where it is faster, else torch's operations.

Code that puts one of these into a program has checked before that the tensors are ordinary ones and
that a kernel serves them (``_served``). The functions here decide what changes from call to call:
the size of the problem, and whether somebody watches torch's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import functional, reference
from fastattn.functional import _served, packing

torchs_attention = F.scaled_dot_product_attention  # override_sdpa puts ours in its place


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: ``[..., in_features]`` -> ``[..., out_features]``."""
    if _served.product_wins(input, weight) and _served.unobserved():
        if packing.packing():
            return functional.linear(input, weight, bias)
        return functional.mlp(input, [weight], [bias])
    return F.linear(input, weight, bias)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(``torch.nn.functional.linear``)."""
    if _served.fuses(input, weight, "relu") and _served.unobserved():
        return functional.linear_relu(input, weight, bias)
    return F.relu(F.linear(input, weight, bias))


def mlp(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Linear-ReLU-...-Linear of ``weights`` ``[N_l, N_{l-1}]``, no ReLU after the last."""
    work = sum(weight.numel() for weight in weights)
    if _served.is_small_product(input, work) or not _served.unobserved():
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            input = F.relu(F.linear(input, weight, bias))
        return F.linear(input, weights[-1], biases[-1])
    return functional.mlp(input, weights, biases)


def linear_activation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dropout_p: float,
) -> Tensor:
    """dropout(activation(``torch.nn.functional.linear``)), activation as in ``fastattn.linear``."""
    if _served.fuses(input, weight, activation, dropout_p) and _served.unobserved():
        return functional.linear(input, weight, bias, activation, dropout_p)
    out = reference.layers.activation(activation)(F.linear(input, weight, bias))
    return dropout(out, dropout_p) if dropout_p > 0.0 else out


def addmm(
    bias: Tensor, input: Tensor, weight: Tensor, activation_name: str | None, dropout_p: float
) -> Tensor:
    """dropout(activation(``torch.addmm``)) with a weight ``[in_features, out_features]``."""
    if _served.crosswise_product_wins(input, weight) and _served.unobserved():
        return functional.linear(input, weight.t(), bias, activation_name, dropout_p)
    out = torch.addmm(bias, input, weight)
    if activation_name is not None:
        return activation(out, activation_name, dropout_p)
    return dropout(out, dropout_p) if dropout_p > 0.0 else out


def gated_linear(
    input: Tensor,
    gate_weight: Tensor,
    weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """activation(linear(input, gate_weight, gate_bias)) * linear(input, weight, bias)."""
    if not _served.fuses(input, weight, activation) or not _served.unobserved():
        gate = reference.layers.activation(activation)(F.linear(input, gate_weight, gate_bias))
        return gate * F.linear(input, weight, bias)
    weights = (gate_weight, weight, None)
    return functional.gated_mlp(input, *weights, gate_bias, bias, activation=activation)


def multi_linear(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """``torch.nn.functional.linear`` of one input with several weights."""
    if _served.product_wins(input, *weights) and _served.unobserved():
        return functional.multi_linear(input, weights, biases)
    return tuple(linear(input, w, b) for w, b in zip(weights, biases, strict=True))


def activation(input: Tensor, name: str, dropout_p: float) -> Tensor:
    """dropout(activation(input)), the activation by its name in ``fastattn.linear``."""
    least = _served.least_activation(name, dropout_p)
    if least is not None and _served.is_row_problem(input, least=least) and _served.unobserved():
        return functional.activation_dropout(input, name, dropout_p)
    out = reference.layers.activation(name)(input)
    return F.dropout(out, dropout_p) if dropout_p > 0.0 else out


def dropout(input: Tensor, p: float) -> Tensor:
    """``torch.nn.functional.dropout`` in training. The kernel's draws are not torch's."""
    if _served.is_row_problem(input, least=_served.LEAST_DROPOUT) and _served.unobserved():
        return functional.activation_dropout(input, None, p)
    return F.dropout(input, p)


def dropout_add_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    kind: str,
) -> Tensor:
    """norm(residual + dropout(input)) over the last dimension.

    Args:
        kind: ``"layer"``, ``"rms_norm"`` (torch's function) or ``"rms"``, which is written out.
    """
    if _norm_served(input, residual, weight, bias, dropout_p, kind):
        tensors = (input, residual, weight, bias)
        return functional.dropout_add_norm(*tensors, dropout_p, eps, kind=_KERNELS_KIND[kind])
    return _norm(_sum(input, residual, dropout_p), weight, bias, eps, kind)


def dropout_add_prenorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """``dropout_add_norm`` and the sum."""
    if _norm_served(input, residual, weight, bias, dropout_p, kind):
        tensors = (input, residual, weight, bias)
        options = {"kind": _KERNELS_KIND[kind], "prenorm": True}
        return functional.dropout_add_norm(*tensors, dropout_p, eps, **options)
    total = _sum(input, residual, dropout_p)
    return _norm(total, weight, bias, eps, kind), total


_KERNELS_KIND: dict[str, Any] = {"layer": "layer", "rms": "rms", "rms_norm": "rms"}


def _norm_served(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    kind: str,
) -> bool:
    least = _served.least_norm(kind, dropout_p)
    return (
        _served.is_row_problem(input, residual, least=least)
        and _served.serves_norm(input if residual is None else residual, weight, bias)
        and _served.unobserved()
    )


def _sum(input: Tensor, residual: Tensor | None, dropout_p: float) -> Tensor:
    input = dropout(input, dropout_p) if dropout_p > 0.0 else input
    return input if residual is None else input + residual


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if kind == "rms_norm":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return out if weight is None else weight * out


def attention_by_size(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``fastattn.scaled_dot_product_attention`` of tensors that a kernel serves; torch's where the
    problem is so small that torch's is faster."""
    small = _served.is_small_attention(query, key, value, dropout_p)
    if small and (attn_mask is None or not is_causal):  # torch takes only one of the two
        attention = torchs_attention
    else:
        attention = functional.scaled_dot_product_attention
    return attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    otherwise: Callable[..., Tensor] = torchs_attention,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, its signature and meaning. What no
    kernel serves (other devices and dtypes, nested tensors, tensor subclasses), and what fastattn
    refuses, goes to ``otherwise``, with torch's own errors."""
    call = (query, key, value, attn_mask, dropout_p, is_causal)
    if _served.serves_sdpa(query, key, value, attn_mask):
        try:
            out = attention_by_size(*call, scale, enable_gqa)
        except (TypeError, ValueError):
            pass  # refused before anything was computed
        else:
            learned = attn_mask is not None and attn_mask.requires_grad
            return out if dropout_p > 0.0 or learned else _laid_out_as(query, out)
    return otherwise(*call, scale=scale, enable_gqa=enable_gqa)


def _laid_out_as(query: Tensor, out: Tensor) -> Tensor:
    """``out`` in query's order of memory, as torch's fused attention gives it: a caller may
    ``view`` it."""
    if query.is_contiguous() or query.shape != out.shape or query.dim() != 4:
        return out
    strides = query.stride()
    order = sorted(range(4), key=lambda d: -strides[d])
    if order[3] != 3 or not out.is_contiguous():
        return out
    there = out.permute(order).contiguous()
    return there.permute(sorted(range(4), key=order.__getitem__))


# A mask that adds less than this to a score hides the key; a bias is never so low.
_LEAST_BIAS = -1000.0


def written_attention(
    query: Tensor,
    key_transposed: Tensor,
    value: Tensor,
    scale: float = 1.0,
    mask: Tensor | None = None,
    fill: float | None = None,
    dropout_p: float = 0.0,
    softmax_dtype: torch.dtype | None = None,
) -> Tensor:
    """softmax(scale · QKᵀ + mask) V as a model writes it out, with torch's operations or ours.

    Args:
        query: ``[..., Sq, D]``; key_transposed: ``[..., D, Sk]``; value: ``[..., Sk, Dv]``.
        mask: broadcasts to ``[..., Sq, Sk]``. Float and added to the scores; or bool, and a score
            is ``fill`` where it is True.
        softmax_dtype: of torch's softmax, whose result becomes value's dtype again.
    """
    key = key_transposed.transpose(-2, -1)
    if _fits_kernels(query, key, value) and (mask is None or _hides_no_row(mask, fill, query, key)):
        mask = ~mask if mask is not None and fill is not None else mask
        return attention_by_size(query, key, value, mask, dropout_p, scale=scale)
    scores = torch.matmul(query, key_transposed)
    scores = scores * scale if scale != 1.0 else scores
    if mask is not None and fill is not None:
        scores = scores.masked_fill(mask, fill)
    elif mask is not None:
        scores = scores + mask
    probs = torch.softmax(scores, -1, dtype=softmax_dtype)
    if softmax_dtype is not None:
        probs = probs.to(value.dtype)
    if dropout_p > 0.0:
        probs = F.dropout(probs, dropout_p)
    return torch.matmul(probs, value)


def _fits_kernels(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        _served.serves_sdpa(query, key, value, None)
        and query.dim() == key.dim() == value.dim() >= 3
        and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
        and min(query.numel(), key.numel(), value.numel()) > 0
    )


def _hides_no_row(mask: Tensor, fill: float | None, query: Tensor, key: Tensor) -> bool:
    """Whether every query sees a key. A row whose keys are all masked is NaN, or a mean of all
    values, depending on the value that stands for masked."""
    shape = (*query.shape[:-1], key.shape[-2])
    if not _served.ordinary(mask) or not 2 <= mask.dim() <= len(shape):
        return False
    if any(m not in (1, s) for m, s in zip(mask.shape[::-1], shape[::-1], strict=False)):
        return False
    if fill is None:
        return bool((mask.detach().amax(-1) > _LEAST_BIAS).all())
    return fill < _LEAST_BIAS and not bool(mask.all(-1).any())


def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
) -> Tensor:
    """``torch._transformer_encoder_layer_fwd`` without a mask, the function that torch.nn's
    layer calls at inference: ``[B, S, E]`` -> ``[B, S, E]``."""

    def attended(x: Tensor) -> Tensor:
        heads = linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(query, key, value)
        return linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def fed(x: Tensor) -> Tensor:
        if not use_gelu:
            return mlp(x, [ffn_weight_1, ffn_weight_2], [ffn_bias_1, ffn_bias_2])
        hidden = linear_activation(x, ffn_weight_1, ffn_bias_1, "gelu", 0.0)
        return linear(hidden, ffn_weight_2, ffn_bias_2)

    norms = ((norm_weight_1, norm_bias_1), (norm_weight_2, norm_bias_2))
    p, kind = 0.0, "layer"
    if norm_first:
        normed = F.layer_norm(src, (embed_dim,), *norms[0], eps)
        normed, total = dropout_add_prenorm(attended(normed), src, *norms[1], p, eps, kind)
        return total + fed(normed)
    src = dropout_add_norm(attended(src), src, *norms[0], p, eps, kind)
    return dropout_add_norm(fed(src), src, *norms[1], p, eps, kind)
