"""``attn_implementation="fastattn"`` for Hugging Face transformers."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastattn import functional

NAME = "fastattn"


def register() -> None:
    """Makes ``attn_implementation="fastattn"`` known to transformers, for attention and for masks. Idempotent."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            f"transformers with AttentionInterface and AttentionMaskInterface is needed ({error}): "
            "pip install 'transformers>=5'"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    # Without an entry of the same name here transformers would drop every mask, padding included.
    AttentionMaskInterface.register(NAME, functools.partial(attention_mask, sdpa_mask))


def attention_mask(sdpa_mask: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """A bool mask (True = attend) broadcastable to ``[B, H, Sq, Sk]``, or None where nothing is masked.

    Padding alone stays ``[B, 1, 1, Sk]``; every other pattern is transformers' own SDPA mask.
    """
    from transformers.masking_utils import bidirectional_mask_function

    padding = kwargs.get("attention_mask")
    padding_only = (
        kwargs.get("mask_function") is bidirectional_mask_function
        and isinstance(padding, Tensor)
        and padding.dim() == 2
        and kwargs.get("kv_offset", 0) == 0
        and padding.shape[-1] == kwargs.get("kv_length")
    )
    if not padding_only:
        return sdpa_mask(*args, **kwargs)
    padding = padding.to(kwargs.get("device", padding.device), torch.bool)
    if not torch.compiler.is_compiling() and bool(padding.all()):
        return None
    return padding[:, None, None, :]


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q ``[B, Hq, Sq, D]``, k and v ``[B, Hk, Sk, D]`` -> (``[B, Sq, Hq, Dv]``, None).

    attention_mask is bool (True = attend) or float (added), 4-D. A sliding window is already in the mask that
    transformers made. Attention weights are not available: ``output_attentions`` needs the eager implementation.
    """
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
            got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else attention_mask
            raise ValueError(f"attention_mask: expected a 4-D tensor [B, H, Sq, Sk], got {got}")
        if attention_mask.dtype != torch.bool and not attention_mask.dtype.is_floating_point:
            raise TypeError(
                f"attention_mask: expected bool or floating point, got {attention_mask.dtype}"
            )
        attention_mask = attention_mask[..., : key.shape[-2]]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = query.shape[2] > 1 and attention_mask is None and bool(causal)
    if position_bias is not None:
        if attention_mask is None:
            attention_mask = position_bias
        elif attention_mask.dtype == torch.bool:
            attention_mask = torch.where(attention_mask, position_bias, -math.inf)
        else:
            attention_mask = attention_mask + position_bias
    out = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=True,
        softcap=softcap or 0.0,
    )
    return out.transpose(1, 2).contiguous(), None
