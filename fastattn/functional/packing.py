"""Weights packed once, for inference: an opt-in, since no check can see every way of changing them.

A product packs the panels of its weight at each call. With few rows of input that is much of its
time. ``pack_weights(True)`` keeps the panels beside each weight, one extra copy of it. They are
dropped when torch's version counter of the weight moves, or its memory, shape, dtype or device
changes, and with the weight itself. torch does not count a change through ``weight.data``: code
that makes such changes between two calls must leave this off. Hence it is off by default.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastattn import ops
from fastattn.functional._autograd import kernel, recording, transforming

_SWITCH = "FASTATTN_PACK_WEIGHTS"


class _Packed(NamedTuple):
    facts: tuple[object, ...]
    panels: Tensor


_packed = WeakIdKeyDictionary()  # weight -> _Packed


def _read_switch() -> bool:
    value = os.environ.get(_SWITCH) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{_SWITCH}: expected 0 or 1, got {value!r}")
    return value == "1"


_enabled = _read_switch()


def pack_weights(enabled: bool = True) -> None:
    """Keeps the weights of linear layers packed between calls without gradients, or no longer.

    ``fastattn.linear``, ``multi_linear`` and the modules on top of them take the panels where they
    multiply with the CPU's kernels. Switching it off gives the memory back. The environment's
    FASTATTN_PACK_WEIGHTS=1 switches it on from the start.

    Args:
        enabled: True or False.

    Raises:
        TypeError: ``enabled`` is no bool.

    >>> import fastattn
    >>> fastattn.pack_weights(True)
    >>> fastattn.pack_weights(False)
    """
    global _enabled
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected a bool, got {type(enabled).__name__}")
    _enabled = enabled
    if not enabled:
        _packed.clear()


def packed_bytes() -> int:
    """The memory of all panels that are kept now.

    >>> packed_bytes()
    0
    """
    return sum(entry.panels.nbytes for entry in list(_packed.values()))


def enabled() -> bool:
    """Whether the switch is on."""
    return _enabled


def packing() -> bool:
    """Whether panels are used by the calls that are made now."""
    return _enabled and not (torch.is_grad_enabled() or recording() or transforming())


def panels_of(weights: list[Tensor]) -> list[Tensor]:
    """The panels of each weight; an empty list where they are not to be used."""
    if not packing():
        return []
    if any(w.is_inference() for w in weights):
        return []  # torch counts no versions of these
    return [_panels(weight) for weight in weights]


def _panels(weight: Tensor) -> Tensor:
    facts = (
        weight._version, weight.data_ptr(), weight.shape, weight.stride(), weight.dtype,
        weight.device,
    )  # fmt: skip
    entry = _packed.get(weight)
    if entry is None or entry.facts != facts:
        entry = _Packed(facts, kernel(ops.pack_weight, weight))
        _packed[weight] = entry
    return entry.panels
