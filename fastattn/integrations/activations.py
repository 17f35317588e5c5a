"""The activations of models whose library is not torch alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from fastattn.nn._plain import fused_activation, has_hooks

_TANH = {"approximate": "tanh"}


def activation_of(activation: object) -> str | None:
    """The activation's name in ``fastattn.linear``: torch's functions and modules, and those of
    transformers that call nothing else."""
    name = fused_activation(activation)
    if name is not None or not isinstance(activation, nn.Module):
        return name
    kind = type(activation)
    if kind.__module__ != "transformers.activations" or "forward" in vars(activation):
        return None
    if has_hooks(activation):
        return None
    act: Any = getattr(activation, "act", None)
    if kind.__name__ == "GELUActivation":
        return "gelu" if act is F.gelu else None
    if kind.__name__ == "GELUTanh":
        tanh = isinstance(act, partial) and act.func is F.gelu and act.keywords == _TANH
        return "gelu_tanh" if tanh else None
    return {
        "NewGELUActivation": "gelu_tanh",
        "QuickGELUActivation": "quick_gelu",
        "SiLUActivation": "silu",
        "ReLUSquaredActivation": "relu2",
    }.get(kind.__name__)
