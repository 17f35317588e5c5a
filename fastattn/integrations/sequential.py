"""``nn.Sequential`` with its stretches of Linear and ReLU in fastattn's kernels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import _products, functional
from fastattn.functional._served import ordinary, serves_layers, unobserved
from fastattn.functional._torch_internals import function_modes, tracing_state
from fastattn.nn._plain import (
    FORWARDS,
    RELU,
    as_written,
    is_plain,
    no_global_hooks,
    to_torch,
)
from fastattn.nn.linear import is_plain_linear


class FusedSequential(nn.Sequential):
    """Runs Linear, ReLU, ... stretches of its children as one kernel each.

    What is fused is decided at each call, from the children as they are then, and the children stay
    what they are: called alone, sliced out, hooked, replaced or reparametrized later, each means
    what it meant before. Where a kernel may not stand in for a stretch, or would not be faster, its
    layers are called one by one, as ``nn.Sequential`` calls them.
    """

    __prepare_scriptable__ = to_torch
    # ``patch`` sets it. Layers that are replaced later make it wrong, which costs time alone.
    _fastattn_small_below = 0

    def __getitem__(self, idx: int | slice) -> nn.Module:
        """A layer, or for a slice the ``nn.Sequential`` of its layers."""
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def forward(self, input: Tensor) -> Tensor:
        # A small call takes some microseconds in all, so its checks are written out. Those for
        # watchers come first: a torch function mode would see the input's attributes being read.
        if (
            type(input) is Tensor
            and not function_modes()
            and tracing_state() is None
            and input.is_cpu
            and input.numel() < self._fastattn_small_below
            and input.dtype not in _products._LACKING
            and nn.Sequential.forward is FORWARDS[nn.Sequential]
        ):
            layers = self._modules.values()
            return call_straight(layers, input) if no_global_hooks() else super().forward(input)
        if not (unobserved() and as_written(nn.Sequential) and no_global_hooks()):
            return super().forward(input)
        stack = list(self)
        x, i = input, 0
        while i < len(stack):
            # Weights are read beside an ordinary tensor alone: a tracer would record the reading.
            linears, relus = linear_relu_stretch(stack, i) if ordinary(x) else ([], 0)
            weights, biases = [m.weight for m in linears], [m.bias for m in linears]
            if not relus or not serves_layers(x, weights, biases):
                x = stack[i](x)
                i += 1
                continue
            if len(linears) > relus:
                x = functional.mlp(x, weights, biases)
            else:
                for weight, bias in zip(weights, biases, strict=True):
                    x = functional.linear_relu(x, weight, bias)
            i += len(linears) + relus
        return x


# A printed model, and counts by class names, stay as they were. A pickle uses the qualified name.
FusedSequential.__name__ = "Sequential"


def call_straight(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Calls the layers one by one, as ``nn.Sequential`` does, where no hook is registered for all
    modules. For a Linear or a ReLU whose call would run torch's function and nothing else it calls
    the function: eight Python frames less for a classifier of two layers, 1 to 3 % of its step."""
    linear, relu = FORWARDS[nn.Linear], FORWARDS[nn.ReLU]
    for layer in layers:
        facts = vars(layer)
        if (  # has_hooks, without its call
            "forward" in facts
            or facts.get("_forward_hooks", True)
            or facts.get("_forward_pre_hooks", True)
            or facts.get("_backward_hooks", True)
            or facts.get("_backward_pre_hooks", True)
            or facts.get("_compiled_call_impl")
        ):
            x = layer(x)
            continue
        kind = type(layer)
        if kind is nn.Linear and nn.Linear.forward is linear:
            own = facts["_parameters"]
            if "weight" in own and "bias" in own and "weight" not in facts and "bias" not in facts:
                x = F.linear(x, own["weight"], own["bias"])
                continue
        elif kind is nn.ReLU and nn.ReLU.forward is relu and F.relu is RELU and not layer.inplace:
            x = torch.relu(x)
            continue
        x = layer(x)
    return x


def linear_relu_stretch(layers: Sequence[Any], start: int) -> tuple[Sequence[nn.Linear], int]:
    """The plain Linears from ``start`` on, with a plain ReLU between any two of them, and how
    many of them a ReLU follows: all, or all but the last."""
    end = start
    while end < len(layers) and (
        is_plain(layers[end], nn.ReLU) if (end - start) % 2 else is_plain_linear(layers[end])
    ):
        end += 1
    return layers[start:end:2], (end - start) // 2
