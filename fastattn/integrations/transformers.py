"""``attn_implementation="fastattn"`` for Hugging Face transformers."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.functional.drop_in import attention_by_size, torchs_attention
from fastattn.integrations.compiler import register_with_accelerate
from fastattn.integrations.pretrained import NAME, unsupported
from fastattn.nn._plain import keeps_torchs_draws

__all__ = ["NAME", "attention_forward", "attention_mask", "register"]

# Arguments that a model may pass to its attention function without any effect on sdpa's result: the
# mask or the keys hold them already, or they are for the flash kernels, the loss or the model's
# other outputs.
_HARMLESS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_q",  # read where no mask is given
        "cu_seq_lens_k",
        "deterministic",
        "ignore_index",
        "labels",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "shift_labels",
        "sliding_window",
        "token_type_ids",
        "use_cache",
    }
)


def register() -> None:
    """Makes ``attn_implementation="fastattn"`` known to transformers, for attention and for masks,
    and ``TrainingArguments(torch_compile_backend="fastattn")`` to accelerate. Idempotent.

    A model that does not take its attention from transformers' interface refuses the name from then
    on, by a ValueError with transformers' words for sdpa. transformers itself lets every registered
    name pass, and such a model would misread our masks or fail in a look-up. ``from_pretrained``
    and ``patch`` reach every stack of a model; ``set_attn_implementation`` does not where the
    stacks hold copies of the config, as T5's do.

    Raises:
        ImportError: transformers is missing, or too old for both interfaces; says what to install.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    except ImportError as error:
        raise ImportError(
            f'attn_implementation="{NAME}" needs Hugging Face transformers ({error}): '
            "pip install 'transformers>=5'"
        ) from error
    AttentionInterface.register(str(NAME), attention_forward)
    # Without an entry of the same name here transformers would drop every mask, padding included.
    AttentionMaskInterface.register(str(NAME), attention_mask)
    _refuse_unfit_models(PreTrainedModel)
    register_with_accelerate()


def _refuse_unfit_models(pretrained: Any) -> None:
    """Puts ``check_model`` before the method by which transformers accepts an implementation."""
    stock = pretrained.get_correct_attn_implementation
    if hasattr(stock, "_fastattn"):
        return

    @wraps(stock)
    def get_correct_attn_implementation(
        self: nn.Module, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if requested_attention == NAME:
            check_model(self)
            requested_attention = NAME  # the one that pickles, which stock returns
        return stock(self, requested_attention, *args, **kwargs)

    vars(get_correct_attn_implementation)["_fastattn"] = True
    pretrained.get_correct_attn_implementation = get_correct_attn_implementation


def check_model(model: Any) -> None:
    """Raises ValueError where ``model`` cannot run with ``attn_implementation="fastattn"``."""
    if not model._supports_sdpa:
        try:
            model._sdpa_can_dispatch()
        except (ValueError, ImportError) as error:
            raise ValueError(f'attn_implementation="{NAME}": {error}') from error
    reason = unsupported(type(model))
    if reason is not None:
        raise ValueError(
            f'attn_implementation="{NAME}": {type(model).__name__} does not support it: {reason}. '
            'Load it with attn_implementation="sdpa" or "eager".'
        )


def attention_mask(**options: Any) -> Tensor | None:
    """The mask of a call, as transformers' mask interface asks for it.

    Args:
        options: the arguments of transformers' ``sdpa_mask``, by keyword.

    Returns:
        bool ``[B, 1, Sq, Sk]``, True = attend, or None where nothing is masked. Padding alone gives
        an expanded view of ``[B, Sk]``; every other pattern is ``sdpa_mask``'s.
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
    if not padding_only or padding is None:
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
        module: the model's attention module; its ``is_causal`` is read.
        query: ``[B, Hq, Sq, D]``, any strides.
        key: ``[B, Hk, Sk, D]``, never repeated for Hk < Hq.
        value: ``[B, Hk, Sk, Dv]``.
        attention_mask: 4-D, broadcastable to ``[B, Hq, Sq, Sk]``: bool (True = attend) or float
            (added). It holds a sliding window already. None: causal if ``is_causal``, or
            ``module.is_causal``, and Sq > 1.
        dropout: probability of dropping an attention weight.
        scaling: of the scores; ``1/sqrt(D)`` by default.
        is_causal: see attention_mask.
        position_bias: float, added to the scores of the keys that the mask leaves. A row with
            nothing to attend to is the mean of all values, as in sdpa and eager attention.
        softcap: of the scores (Gemma 2, arXiv 2408.00118).
        s_aux: attention sinks: refused.
        kwargs: whatever else the model passes on. Without a mask, ``cu_seq_lens_q`` (int32, where
            each sequence of query starts, and Sq), ``cu_seq_lens_k``, ``max_length_q`` and
            ``max_length_k`` keep sequences apart that are packed into one row. What is known not to
            change the result is ignored.

    Returns:
        ``[B, Sq, Hq, Dv]`` contiguous, and None: no weights are ever made.

    Raises:
        ValueError: a mask of another rank, attention sinks, packed sequences in more than one row
            or with a bias, a keyword that is not None and not known to be without effect
            (``indices`` and ``block_indices`` of sparse attention), and what
            ``fastattn.scaled_dot_product_attention`` refuses.
        TypeError: a mask of another type, and likewise.

    >>> import torch
    >>> from fastattn.integrations.transformers import attention_forward
    >>> query, key, value = torch.randn(3, 2, 8, 16, 64)
    >>> out, weights = attention_forward(torch.nn.Module(), query, key, value, None)
    >>> out.shape, weights
    (torch.Size([2, 16, 8, 64]), None)
    """
    for name, given in kwargs.items():
        if given is not None and name not in _HARMLESS:
            raise ValueError(
                f"{name}: {NAME} attention does not know this argument and cannot leave it out, "
                "use another attn_implementation"
            )
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
    starts = kwargs.get("cu_seq_lens_q")
    if attention_mask is None and starts is not None and starts.shape[0] > 2:
        _check_packed(query, position_bias, kwargs)
        return _packed_attention(query, key, value, dropout, scaling, causal, softcap, kwargs), None
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias, key)
    call = (query, key, value, attention_mask, dropout, causal, scaling, True)
    if dropout > 0.0 and keeps_torchs_draws(module):
        out = torchs_attention(*call[:6], scale=scaling, enable_gqa=True)
    elif softcap:
        out = functional.scaled_dot_product_attention(*call, softcap=softcap)
    else:
        out = attention_by_size(*call)
    return out.transpose(1, 2).contiguous(), None


def _with_bias(mask: Tensor | None, bias: Tensor, key: Tensor) -> Tensor:
    """The mask to add to the scores. A masked key gets the least finite number, as in sdpa and
    eager attention, so that a row of them alone is a mean of all values."""
    if mask is None:
        return bias
    if mask.dtype != torch.bool:
        return mask + bias
    lowest = torch.finfo(key.dtype).min
    if torch.is_autocast_enabled(key.device.type):
        computed = torch.get_autocast_dtype(key.device.type)
        lowest = max(lowest, torch.finfo(computed).min)  # finite after the cast as well
    return torch.where(mask, bias, lowest)


def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
    given: dict[str, Any],
) -> Tensor:
    """Attention of sequences packed into one row, ``[1, Sq, Hq, Dv]``."""
    starts_q = given["cu_seq_lens_q"]
    starts_k = given.get("cu_seq_lens_k")
    starts_k = starts_q if starts_k is None else starts_k
    longest_q, longest_k = (
        int(starts.diff().max()) if given.get(name) is None else int(given[name])
        for name, starts in (("max_length_q", starts_q), ("max_length_k", starts_k))
    )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return functional.varlen_attn(
        query,
        key,
        value,
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        causal,
        scaling,
        dropout_p=dropout,
        softcap=softcap,
    )[None]


def _check_packed(query: Tensor, position_bias: Tensor | None, given: dict[str, Any]) -> None:
    """Packed sequences of a call without a mask, which has nothing else to keep them apart."""
    if query.shape[0] != 1:
        raise ValueError(
            "cu_seq_lens_q: expected sequences packed into one row, "
            f"got a query of {query.shape[0]} rows"
        )
    for name, x in (
        ("position_bias", position_bias),
        ("sliding_window", given.get("sliding_window")),
    ):
        if x is not None:
            raise ValueError(
                f"{name}: expected None beside cu_seq_lens_q and no mask: packed sequences are "
                "kept apart by the mask, which transformers makes of position_ids, pass these"
            )


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
