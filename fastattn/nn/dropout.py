"""Dropout by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastattn import functional
from fastattn.functional._served import is_large_dropout, readable, serves_dropout, unobserved
from fastattn.nn._plain import (
    as_written,
    has_hooks,
    keeps_torchs_draws,
    run_torchs,
    scripted_as,
)


class Dropout(nn.Dropout):
    """``torch.nn.Dropout``, whose mask is drawn by the kernels and never stored.

    The kernels take contiguous inputs on a CPU from 8192 elements on (float64: 16384), where they
    are faster; every other call is torch's, with ``inplace`` too. Their random numbers come from
    one seed that torch's generator draws: the same state of the generator gives the same result,
    which is another one than torch's.

    Args:
        p: probability of dropping an element in training.
        inplace: overwrite the input.

    Raises:
        ValueError: p outside [0, 1].

    >>> import torch, fastattn
    >>> fastattn.nn.Dropout(0.5)(torch.ones(64, 256)).unique()
    tensor([0., 2.])
    """

    __prepare_scriptable__ = scripted_as(nn.Dropout)

    def forward(self, input: Tensor) -> Tensor:
        """Drops elements of input in training and scales the others by 1 / (1 - p).

        Args:
            input: any shape.

        Returns:
            A tensor of input's shape and dtype; a NaN stays a NaN.
        """
        if readable(input) and not (self.training and is_large_dropout(input)):
            return super().forward(input)
        if not self.training or self.inplace or not 0.0 < self.p < 1.0:
            return run_torchs(self, super().forward, input)
        if not (unobserved() and as_written(nn.Dropout) and serves_dropout(input)):
            return run_torchs(self, super().forward, input)
        return functional.activation_dropout(input, None, self.p)


def is_dropout(module: object) -> bool:
    """Whether the module's class is torch's Dropout or the one above."""
    return type(module) in (nn.Dropout, Dropout)


def is_plain_dropout(module: nn.Module) -> bool:
    """Whether calling ``module`` is ``nn.Dropout``'s work and nothing else."""
    return is_dropout(module) and not has_hooks(module) and as_written(nn.Dropout)


def active_dropout(module: nn.Module) -> float | None:
    """The probability with which a plain dropout drops an element now; None for another module."""
    if not is_plain_dropout(module):
        return None
    facts: Any = module
    return facts.p if facts.training else 0.0


def fused_dropout(owner: nn.Module, module: nn.Module) -> float | None:
    """``active_dropout(module)``, None too where it drops elements and ``owner``, the layer or
    block that it is part of, must draw what torch draws."""
    p = active_dropout(module)
    return None if p and keeps_torchs_draws(owner) else p
