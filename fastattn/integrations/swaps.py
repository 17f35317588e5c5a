"""The changes that ``patch`` makes to a model, each of which can be undone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fastattn.integrations import pretrained, transformers
from fastattn.nn._plain import FORMER_CLASS, SMALL_BELOW, TORCHS_DRAWS, UNPAD, to_torch


@dataclass(frozen=True)
class ClassSwap:
    """One module whose class will change."""

    name: str
    module: nn.Module
    before: type[nn.Module]
    after: type[nn.Module]
    reason: str
    small_below: int | None = None  # elements of an input below which torch's code runs unchecked
    dropout: bool = True  # its dropout may draw other numbers than torch's
    unpad: bool = False  # it skips padding

    def do(self) -> None:
        if type(self.module) is not self.before:
            raise RuntimeError(
                f"{self.name or '(root)'}: expected a {self.before.__name__}, as planned, got "
                f"{type(self.module).__name__}: plan again"
            )
        vars(self.module)[FORMER_CLASS] = self.before
        if not self.dropout:
            vars(self.module)[TORCHS_DRAWS] = True
        if self.small_below is not None:
            vars(self.module)[SMALL_BELOW] = self.small_below
        if self.unpad:
            vars(self.module)[UNPAD] = True
        self.module.__class__ = self.after

    def undo(self) -> None:
        to_torch(self.module)


@dataclass(frozen=True)
class AttentionSwap:
    """One Hugging Face model whose attention will become fastattn's."""

    part: pretrained.Part
    dropout: bool = True  # as in ClassSwap

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def before(self) -> str:
        return self.part.before

    @property
    def after(self) -> str:
        return f"{pretrained.NAME} attention"

    @property
    def reason(self) -> str:
        return (
            f"{len(self.part.attentions)} modules take their attention from the AttentionInterface"
        )

    def do(self) -> None:
        transformers.register()
        self.part.apply(self.dropout)

    def undo(self) -> None:
        pretrained.undo(self.part.model)
