"""``attn_implementation="fastattn"`` for Hugging Face transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn import functional

NAME = "fastattn"


def register() -> None:
    """Makes ``attn_implementation="fastattn"`` known to transformers, for attention and for masks.
    Idempotent.

    Raises ImportError, saying what to install, without a transformers that has both interfaces.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f'attn_implementation="{NAME}" needs Hugging Face transformers ({error}): '
            "pip install 'transformers>=5'"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    # Without an entry of the same name here transformers would drop every mask, padding included.
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(**options: Any) -> Tensor | None:
    """transformers' mask interface, with ``sdpa_mask``'s arguments, by keyword.

    Returns bool ``[B, 1, Sq, Sk]``, True = attend, or None where nothing is masked. Padding alone
    gives an expanded view of ``[B, Sk]``; every other pattern is ``sdpa_mask``'s.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    batch, seq_q, seq_k = (options[name] for name in ("batch_size", "q_length", "kv_length"))
    padding = options.get("attention_mask")
    kv_offset = options.get("kv_offset", 0)
    padding_only = (
        options.get("mask_function") is bidirectional_mask_function
        and isinstance(padding, Tensor)
        and padding.shape == (batch, seq_k)
        and isinstance(kv_offset, int)
        and kv_offset == 0
    )
    if not padding_only:
        return sdpa_mask(**options)
    padding = padding.to(options.get("device", padding.device), torch.bool)
    may_skip = options.get("allow_is_bidirectional_skip", False)
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if may_skip and not tracing and bool(padding.all()):
        return None
    return padding[:, None, None, :].expand(batch, 1, seq_q, seq_k)


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, with the meaning of its ``sdpa``.

    Args:
        query: ``[B, Hq, Sq, D]``; key, value: ``[B, Hk, Sk, D]``, never repeated for Hk < Hq; any
            strides.
        attention_mask: 4-D, broadcastable to ``[B, Hq, Sq, Sk]``: bool (True = attend) or float
            (added). It holds a sliding window already. None: causal if ``is_causal``, or
            ``module.is_causal``, and Sq > 1.
        position_bias: float, added to the scores, as attention_mask; softcap: of the scores.

    Returns:
        ``[B, Sq, Hq, D]`` contiguous, and None: no weights are ever made.

    Raises:
        ValueError, TypeError: a mask of another kind, attention sinks (``s_aux``), and what the
            function itself refuses.
    """
    if s_aux is not None:
        raise ValueError(
            "s_aux: attention sinks are not supported, use another attn_implementation"
        )
    if kwargs.get("output_attentions"):
        _warn_no_weights()
    if attention_mask is not None:
        _check_mask(attention_mask)
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


def _check_mask(mask: object) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor or None, got {type(mask).__name__}")
    if mask.dim() != 4:
        raise ValueError(
            f"attention_mask: expected 4 dimensions [B, H, Sq, Sk], got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(
            "attention_mask: expected bool (True = attend) or floating point (added), "
            f"got {mask.dtype}"
        )


def _warn_no_weights() -> None:
    from transformers.utils import logging

    logging.get_logger(__name__).warning_once(
        f"`{NAME}` attention does not support `output_attentions=True`."
        " Please set your attention to `eager` if you want any of these features."
    )
