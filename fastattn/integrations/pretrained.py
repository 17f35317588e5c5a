"""What ``patch`` and ``unpatch`` do to Hugging Face models: their attention implementation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastattn.integrations.transformers import NAME, register

FORMER_ATTENTION = "_fastattn_former_attn_implementation"


class Former:
    """The attention implementations that a model had, "" for its own and by name for those of the
    models inside it. The patched model keeps it. Unpickled, as a part of that model, it makes
    ``attn_implementation="fastattn"`` known to a process that has imported nothing yet."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        register()


class Refused(Exception):
    """transformers would not set the implementation; the model is as it was."""


@dataclass(frozen=True)
class AttentionSwap:
    """One model whose attention implementation is to be fastattn's."""

    name: str
    model: nn.Module
    before: str
    after: str = f"{NAME} attention"
    reason: str = "set_attn_implementation"

    def do(self) -> None:
        register()
        config = self.model.config
        inner = {key: getattr(config, key, None) for key in config.sub_configs}
        former = {key: c._attn_implementation for key, c in inner.items() if c is not None}
        former[""] = config._attn_implementation
        try:
            self.model.set_attn_implementation(NAME)
        except (ValueError, ImportError) as error:
            self.model.set_attn_implementation(former)
            raise Refused(str(error)) from error
        if config._attn_implementation != NAME:
            self.model.set_attn_implementation(former)
            raise Refused(
                f"{type(self.model).__name__} does not take its attention from the interface"
            )
        vars(self.model)[FORMER_ATTENTION] = Former(former)

    def undo(self) -> None:
        restore(self.model)


def restore(model: nn.Module) -> str:
    """Gives a swapped model its attention implementations again; the name of its own."""
    former = vars(model)[FORMER_ATTENTION].names
    model.set_attn_implementation(former)
    del vars(model)[FORMER_ATTENTION]
    return former[""]


def outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """The Hugging Face models in ``model`` that are in no other one, each with its name and the
    models that it consists of, itself among them."""
    pretrained = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    if pretrained is None:
        return
    inner: set[nn.Module] = set()  # set_attn_implementation reaches the models inside a model
    for name, module in model.named_modules():
        if isinstance(module, pretrained) and module not in inner:
            inner.update(module.modules())
            yield name, module, [m for m in module.modules() if isinstance(m, pretrained)]


def why_not(
    model: nn.Module,
    parts: list[nn.Module],
    no_kernel: Callable[[str, torch.device, torch.dtype], str | None],
) -> str | None:
    """Why the model must keep its attention, or None."""
    if model.config._attn_implementation == NAME:
        return "already patched"
    unfit = next((part for part in parts if not part._supports_sdpa), None)
    if unfit is not None:
        return f"{type(unfit).__name__} does not support sdpa, whose interface fastattn takes over"
    if model.config.output_attentions:
        return "config.output_attentions: only eager attention has the weights"
    return no_kernel("attention", model.device, model.dtype)
