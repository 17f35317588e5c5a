"""Calls that stand in for torch's own: a kernel where it is faster, else torch's operations.

Whoever puts one of these into a program has seen, before, that the tensors are ordinary ones and
that a kernel serves them (``_served``). What changes from call to call is decided here: the size of
the problem, and whether somebody watches torch's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from fastattn import functional
from fastattn.functional import _served

_torchs_attention = F.scaled_dot_product_attention  # override_sdpa puts ours in its place


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: ``[..., in_features]`` -> ``[..., out_features]``."""
    if _served.product_wins(input, weight) and _served.unobserved():
        return functional.mlp(input, [weight], [bias])
    return F.linear(input, weight, bias)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(``torch.nn.functional.linear``)."""
    if _served.is_small_product(input, weight.numel()) or not _served.unobserved():
        return F.relu(F.linear(input, weight, bias))
    return functional.linear_relu(input, weight, bias)


def mlp(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Linear-ReLU-...-Linear of ``weights`` ``[N_l, N_{l-1}]``, no ReLU after the last."""
    work = sum(weight.numel() for weight in weights)
    if _served.is_small_product(input, work) or not _served.unobserved():
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            input = F.relu(F.linear(input, weight, bias))
        return F.linear(input, weights[-1], biases[-1])
    return functional.mlp(input, weights, biases)


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
        attention = _torchs_attention
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
    otherwise: Callable[..., Tensor] = _torchs_attention,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, its signature and meaning. What no
    kernel serves (other devices and dtypes, nested tensors, tensor subclasses), and what fastattn
    refuses, goes to ``otherwise``, with torch's own errors."""
    call = (query, key, value, attn_mask, dropout_p, is_causal)
    if _served.serves_sdpa(query, key, value, attn_mask):
        try:
            return attention_by_size(*call, scale, enable_gqa)
        except (TypeError, ValueError):
            pass  # refused before anything was computed
    return otherwise(*call, scale=scale, enable_gqa=enable_gqa)


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
    """``torch._transformer_encoder_layer_fwd`` without a mask, by which torch.nn's layer runs at
    inference: ``[B, S, E]`` -> ``[B, S, E]``."""

    def attended(x: Tensor) -> Tensor:
        heads = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(query, key, value)
        return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def fed(x: Tensor) -> Tensor:
        if not use_gelu:
            return mlp(x, [ffn_weight_1, ffn_weight_2], [ffn_bias_1, ffn_bias_2])
        return F.linear(F.gelu(F.linear(x, ffn_weight_1, ffn_bias_1)), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        src = src + attended(norm_1(src))
        return src + fed(norm_2(src))
    src = norm_1(src + attended(src))
    return norm_2(src + fed(src))
