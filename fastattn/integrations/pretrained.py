"""Hugging Face models: which of them take their attention from transformers' AttentionInterface,
and ``patch``'s part for those.

A swap changes the name of the implementation in the configs that the model's modules hold, and
nothing else. fastattn's function and masks have the meaning of ``sdpa``, so that a model may hold
both names, and only ``sdpa`` is taken over: eager attention can return its weights, and the flash
and flex implementations take masks of other kinds.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from fastattn import backends
from fastattn.nn._plain import TORCHS_DRAWS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class _Name(str):
    """A string that a process learns to serve when it unpickles it: whatever holds the name, a
    model, a layer or a config, can be sent anywhere, as with the names of transformers' own."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[], _Name], tuple[()]]:
        return _learned, ()


def _learned() -> _Name:
    from fastattn.integrations.transformers import register

    register()
    return NAME


NAME = _Name("fastattn")
_TAKEN_OVER = "sdpa"
_FORMER = "_fastattn_former_attention"

# Code that decides by the implementation's name knows sdpa's and not ours.
_DECIDES_BY_NAME = re.compile(
    r"_attn_implementation\s*(?:==|!=|in|not in)\s*[^\n]*[\"']sdpa[\"']"
    r"|\w+_CLASSES\[[\w.]*_attn_implementation\]"
)
_ATTENTION_CLASS = re.compile(r"^class \w*Attention\w*\(nn\.Module\):", re.MULTILINE)
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def unsupported(kind: Any) -> str | None:
    """Why a class of pretrained models cannot run on another implementation of attention in
    sdpa's place, or None. It judges by ``_supports_sdpa`` and by the source of the file that
    defines the class, as transformers does in ``set_attn_implementation``."""
    if not kind._supports_sdpa:
        return f"{kind.__name__} does not support sdpa, whose interface fastattn takes over"
    for base in kind.__mro__:
        if not hasattr(base, "_supports_sdpa"):
            break
        source = _source(base.__module__)
        if _DECIDES_BY_NAME.search(source):
            return f"code of {base.__name__} asks whether the implementation's name is sdpa"
        if _ATTENTION_CLASS.search(source) and _INTERFACE not in source:
            return f"{base.__name__} does not take its attention from the AttentionInterface"
    return None


@cache
def _source(module: str) -> str:
    """The module's source; empty where there is none, as in a notebook."""
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


@cache
def _asks_the_interface(kind: type[nn.Module]) -> bool:
    """Whether a method of the class looks its attention function up."""
    methods = (
        inspect.unwrap(f)
        for base in kind.__mro__
        if base.__module__ not in ("torch.nn.modules.module", "transformers.modeling_utils")
        for f in vars(base).values()
        if callable(f)
    )
    return any(_INTERFACE in f.__code__.co_names for f in methods if hasattr(f, "__code__"))


@dataclass
class Part:
    """A pretrained model inside the model that is patched, without those inside it in turn."""

    name: str
    model: nn.Module
    configs: list[PreTrainedConfig] = field(default_factory=list)  # that its modules hold
    attentions: list[nn.Module] = field(default_factory=list)  # that ask the interface
    leaf: bool = True  # no other pretrained model inside
    reason: str | None = None  # why it stays; None: it will be swapped
    before: str = ""  # its attention, in the words of the report

    def apply(self, dropout: bool = True) -> None:
        """Sets fastattn's attention and notes what ``undo`` needs. The name must be registered.
        Without ``dropout`` attention that drops weights is torch's own."""
        changed = [c for c in self.configs if c._attn_implementation == _TAKEN_OVER]
        _set(changed, NAME)
        vars(self.model)[_FORMER] = Former(changed)
        if not dropout:
            for module in self.attentions:
                vars(module)[TORCHS_DRAWS] = True


@dataclass
class Former:
    """The configs whose implementation ``patch`` changed. A copy of the model has copies here."""

    configs: list[PreTrainedConfig]


def _set(configs: Iterable[PreTrainedConfig], name: str) -> None:
    for config in configs:
        # The public attribute would set the configs inside as well, checked or not.
        config._attn_implementation_internal = name
        if config._attn_implementation != name:
            raise RuntimeError("this transformers keeps the name of the attention elsewhere")


def plan(model: nn.Module) -> list[Part]:
    """The parts of ``model`` that ``patch`` reports, each with its reason to stay or None. Changes
    nothing. Empty without transformers."""
    pretrained = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    if pretrained is None:
        return []
    parts = list(_parts(model, pretrained))
    for part in parts:
        part.reason = _unsupported_part(part)
    for part in parts:
        part.reason = part.reason or _unsupported_shared(part, parts)
    for outer in (p for p in parts if _only_holds_others(p)):
        _follow(outer, [p for p in parts if p.attentions and _is_inside(p, outer)])
    return [p for p in parts if p.attentions or p.leaf]


def _only_holds_others(part: Part) -> bool:
    return not part.attentions and not part.leaf and unsupported(type(part.model)) is None


def _is_inside(part: Part, outer: Part) -> bool:
    return part is not outer and part.name.startswith(f"{outer.name}." if outer.name else "")


def _follow(outer: Part, inner: list[Part]) -> None:
    """Changes the config of a model without attention of its own, where people look for the
    name, when all the models inside change."""
    if inner and all(p.reason is None for p in inner):
        inner[0].configs += outer.configs


def _parts(model: nn.Module, pretrained: type[nn.Module]) -> Iterator[Part]:
    config_class = sys.modules["transformers"].PreTrainedConfig
    owners: dict[str, Part | None] = {}
    for name, module in model.named_modules():
        parent = owners.get(name.rpartition(".")[0]) if name else None
        part = parent
        if isinstance(module, pretrained):
            part = Part(name, module, before=_words(module.config))
            outer = parent
            while outer is not None and outer.leaf:
                outer.leaf = False
                outer = owners.get(outer.name.rpartition(".")[0]) if outer.name else None
        owners[name] = part
        if part is None:
            continue
        if _asks_the_interface(type(module)):  # type: ignore[arg-type]
            part.attentions.append(module)
        for value in vars(module).values():
            if isinstance(value, config_class) and not any(c is value for c in part.configs):
                part.configs.append(value)
        if part.model is module:
            yield part


def _unsupported_part(part: Part) -> str | None:
    model: Any = part.model
    config = model.config
    if _FORMER in vars(model):
        return "already patched"
    reason = unsupported(type(model))
    if reason is not None:
        return reason
    if not part.attentions:
        return "no module of its own takes its attention from the AttentionInterface"
    names = {c._attn_implementation for c in part.configs}
    if _TAKEN_OVER not in names:
        if "eager" in names:
            return "eager attention can return its weights (output_attentions), fastattn's cannot"
        return f"it is set to {config._attn_implementation}, and patch takes over sdpa alone"
    if any(getattr(c, "attn_logit_softcapping", None) for c in part.configs):
        return "sdpa leaves out its softcap (attn_logit_softcapping), fastattn would apply it"
    return backends.why_no_kernel("attention", model.device, model.dtype)


def _unsupported_shared(part: Part, parts: list[Part]) -> str | None:
    """A config cannot change while a part that must stay holds it."""
    for other in parts:
        shared = any(c is d for c in part.configs for d in other.configs)
        must_stay = bool(other.attentions) or unsupported(type(other.model)) is not None
        if shared and must_stay and other.reason is not None:
            return f"it shares its config with {other.name or '(root)'}: {other.reason}"
    return None


def undo(module: nn.Module) -> tuple[str, str | None, str] | None:
    """Takes back what ``Part.apply`` changed in ``module``: what it was, what it is now (None: left
    alone) and why, or None where ``patch`` changed nothing. A config that was given another
    implementation since keeps it."""
    former = vars(module).pop(_FORMER, None)
    if former is None:
        return None
    for inner in module.modules():
        vars(inner).pop(TORCHS_DRAWS, None)
    ours = [c for c in former.configs if c._attn_implementation == NAME]
    if former.configs and not ours:
        return _words(module.config), None, "its attention was set to another one after patch"
    _set(ours, _TAKEN_OVER)
    return f"{NAME} attention", f"{_TAKEN_OVER} attention", "restored"


def _words(config: PreTrainedConfig) -> str:
    return f"{config._attn_implementation} attention"
