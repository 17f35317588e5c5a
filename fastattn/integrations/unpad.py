"""Encoders of Hugging Face that skip their padding.

``patch(model, unpad=True)`` gives an encoder of a known class a subclass. Its forward takes the
tokens out of the padded batch, runs the class's own forward on one row that holds all of them, one
sequence behind the other, and puts the results back; places of padding get 0. fastattn's attention
is told where the sequences start by transformers' own arguments for packed sequences
(``cu_seq_lens_q`` and so on). Everything else in these encoders computes each token by itself.

That is so for the classes listed here, and a version of transformers might change it. Before an
encoder's first use a small one of its class and config is therefore run in both ways.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastattn import backends
from fastattn.functional._served import ordinary, unobserved
from fastattn.integrations.pretrained import NAME
from fastattn.nn._packed import Packing, packing_of, why_not_packed
from fastattn.nn._plain import FORMER_CLASS, no_global_hooks, to_torch, unpickled

_HOME = "transformers.models"
_KNOWN = frozenset(
    f"{_HOME}.{name}"
    for name in (
        "altclip.modeling_altclip.AltRobertaEncoder",
        "bert.modeling_bert.BertEncoder",
        "bert_generation.modeling_bert_generation.BertEncoder",
        "camembert.modeling_camembert.CamembertEncoder",
        "chinese_clip.modeling_chinese_clip.ChineseCLIPTextEncoder",
        "data2vec.modeling_data2vec_text.Data2VecTextEncoder",
        "distilbert.modeling_distilbert.Transformer",
        "electra.modeling_electra.ElectraEncoder",
        "ernie.modeling_ernie.ErnieEncoder",
        "roberta.modeling_roberta.RobertaEncoder",
        "roberta_prelayernorm.modeling_roberta_prelayernorm.RobertaPreLayerNormEncoder",
        "roc_bert.modeling_roc_bert.RoCBertEncoder",
        "xlm_roberta.modeling_xlm_roberta.XLMRobertaEncoder",
        "xlm_roberta_xl.modeling_xlm_roberta_xl.XLMRobertaXLEncoder",
    )
)
# Arguments that these encoders pass on to their layers, where nothing reads them.
_UNREAD = frozenset({"labels", "num_items_in_batch", "position_ids", "return_dict"})
# Modules of other files inside an encoder that compute each token by itself.
_TOKENWISE_HOMES = (
    "fastattn.nn.dropout",
    "fastattn.nn.linear",
    "fastattn.nn.mlp",
    "fastattn.nn.norm",
    "fastattn.integrations.sequential",
    "peft.tuners.lora.layer",
    "transformers.activations",
)


class Unpadded:
    """What the subclass of an encoder adds to its class."""

    __prepare_scriptable__ = to_torch

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        own: Any = super().forward  # type: ignore[misc]
        packing = _packing(self, hidden_states, attention_mask, args, kwargs)
        if packing is None:
            return own(hidden_states, attention_mask, *args, **kwargs)
        out = own(packing.pack(hidden_states)[None], None, *args, **kwargs, **_packed(packing))
        out.last_hidden_state = packing.unpack(out.last_hidden_state[0])
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle, and a copy, names the former class and makes the subclass anew."""
        former = vars(self).get(FORMER_CLASS)
        if former is None or not is_unpadded(type(self)):  # another library changed the class
            return super().__reduce_ex__(protocol)
        return unpickled, (unpadded, former), dict(vars(self))


def unpadded(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass of an encoder's class that skips padding; None for a class that is not known."""
    known = f"{kind.__module__}.{kind.__qualname__}" in _KNOWN and not is_unpadded(kind)
    if known and kind not in _made:
        _made[kind] = _make(kind)
    return _made.get(kind)


_made: dict[type[nn.Module], type[nn.Module]] = {}


def _make(kind: type[nn.Module]) -> type[nn.Module]:
    members = {
        "_fastattn_name": f"{kind.__name__} without padding",
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (Unpadded, kind), members)


def is_unpadded(kind: type) -> bool:
    """Whether ``patch`` made the class, and nobody one of it."""
    return issubclass(kind, Unpadded) and kind in _made.values()


def _packed(packing: Packing) -> dict[str, Any]:
    """Transformers' arguments for packed sequences."""
    return {
        "cu_seq_lens_q": packing.starts,
        "cu_seq_lens_k": packing.starts,
        "max_length_q": packing.longest,
        "max_length_k": packing.longest,
    }


def _packing(
    encoder: Any, hidden: Tensor, mask: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Packing | None:
    """The packing to run on; None where the padded batch runs."""
    if mask is None or torch.compiler.is_compiling():
        return None  # nothing is padded; lengths are data, which no compiler knows
    reason = _why_not(encoder, hidden, mask, args, kwargs)
    if reason is not None:
        kind = type(encoder).__name__
        backends.warn_once(f"unpad: {kind} runs padded: {reason}", 4)
        return None
    return packing_of(mask[:, 0, 0])


def _why_not(
    encoder: Any, hidden: Tensor, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    held = list(configs(encoder))
    if any(c._attn_implementation != NAME for c in held):
        return "its attention is not fastattn's"
    if not _is_padding(mask, hidden):
        return "its mask is not one of padding"
    more = [f"argument {i + 3}" for i, x in enumerate(args) if x is not None]
    more += [n for n, x in kwargs.items() if n not in _UNREAD and x is not None and x is not False]
    if more:
        return f"it is called with {', '.join(more)}"
    if not unobserved() or not ordinary(hidden, mask) or not no_global_hooks():
        return "its calls are recorded, or its tensors are no ordinary ones"
    home = type(encoder).__module__
    reason = why_not_packed(
        encoder,
        lambda kind: kind.__module__ == home or kind.__module__ in _TOKENWISE_HOMES,
        _records_nothing,
    )
    if reason is not None:
        return reason
    if not held or not _agrees(encoder, held[0]):
        return "this version of transformers gives packed sequences another result"
    return None


def _is_padding(mask: Tensor, hidden: Tensor) -> bool:
    """Whether a mask hides the same keys from all queries: bool ``[B, 1, 1 or S, S]``."""
    return (
        type(mask) is Tensor
        and mask.dtype == torch.bool
        and mask.dim() == 4
        and hidden.dim() == 3
        and mask.shape[1] == 1
        and (mask.shape[2] == 1 or mask.stride(2) == 0)
        and (mask.shape[0], mask.shape[3]) == hidden.shape[:2]
    )


def _records_nothing(hook: Any) -> bool:
    """Whether a hook is one of those by which transformers collects hidden states, and nobody has
    asked for these."""
    if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return False
    from transformers.utils import output_capturing

    return not output_capturing._active_collector.get()


def configs(encoder: nn.Module) -> Iterator[Any]:
    """The configs that an encoder's modules hold."""
    for module in encoder.modules():
        config = vars(module).get("config")
        if config is not None:
            yield config


_agreeing: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _agrees(encoder: nn.Module, config: Any) -> bool:
    """Whether a small encoder of the class and the config gives packed sequences what it gives
    padded ones."""
    if encoder not in _agreeing:
        try:
            _agreeing[encoder] = _compared(vars(encoder)[FORMER_CLASS], config)
        except Exception:  # whatever a version of transformers raises, it is no agreement
            _agreeing[encoder] = False
    return _agreeing[encoder]


@torch.no_grad()
def _compared(kind: type[nn.Module], config: Any) -> bool:
    config = copy.deepcopy(config)
    config.num_attention_heads, config.hidden_size, config.num_hidden_layers = 2, 16, 2
    config.intermediate_size = config.hidden_dim = 24
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
    ):
        torch.manual_seed(0)
        encoder = kind(config).double().eval()
        hidden = torch.randn(3, 7, 16, dtype=torch.float64)
        tokens = torch.arange(7) < torch.tensor([[7], [2], [4]])
        mask = tokens[:, None, None].expand(3, 1, 7, 7)
        packing = packing_of(tokens)
        assert packing is not None
        padded = encoder(hidden, mask).last_hidden_state
        packed = encoder(packing.pack(hidden)[None], None, **_packed(packing)).last_hidden_state
    return torch.allclose(packing.pack(padded), packed[0], rtol=1e-9, atol=1e-12)
