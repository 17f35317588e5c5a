"""``nn.Sequential`` with its stretches of Linear and ReLU in fastattn's kernels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from fastattn import functional
from fastattn.functional._served import is_small, ordinary, serves_layers, unobserved
from fastattn.nn._plain import as_written, is_plain, no_global_hooks, to_torch
from fastattn.nn.linear import is_plain_linear


class FusedSequential(nn.Sequential):
    """Runs Linear, ReLU, ... stretches of its children as one kernel each.

    What is fused is decided at each call, from the children as they are then, and the children stay
    what they are: called alone, sliced out, hooked, replaced or reparametrized later, each means
    what it meant before. Where a kernel may not stand in for a stretch, or would not be faster, its
    layers are called one by one, as ``nn.Sequential`` calls them.
    """

    __prepare_scriptable__ = to_torch

    def __getitem__(self, idx: int | slice) -> nn.Module:
        """A layer, or for a slice the ``nn.Sequential`` of its layers."""
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def forward(self, input: Tensor) -> Tensor:
        # Who watches torch's functions would see the input's attributes read as well.
        if not unobserved() or is_small(input, self._modules.values()):
            return super().forward(input)
        if not (as_written(nn.Sequential) and no_global_hooks()):
            return super().forward(input)
        layers = list(self)
        x, i = input, 0
        while i < len(layers):
            # What is no ordinary tensor (a tracer's proxy, for one) must not see weights read.
            linears, relus = linear_relu_stretch(layers, i) if ordinary(x) else ([], 0)
            weights, biases = [m.weight for m in linears], [m.bias for m in linears]
            if not relus or not serves_layers(x, weights, biases):
                x = layers[i](x)
                i += 1
                continue
            if len(linears) > relus:
                x = functional.mlp(x, weights, biases)
            else:
                for weight, bias in zip(weights, biases, strict=True):
                    x = functional.linear_relu(x, weight, bias)
            i += len(linears) + relus
        return x


# What prints a model, or counts by classes, shows what it showed before. A pickle goes by the
# qualified name.
FusedSequential.__name__ = "Sequential"


def linear_relu_stretch(layers: Sequence[nn.Module], start: int) -> tuple[Sequence[nn.Linear], int]:
    """The plain Linears from ``start`` on, a plain ReLU between any two of them, and how many of
    these have a ReLU behind them: all, or all but the last."""
    end = start
    while end < len(layers) and (
        is_plain(layers[end], nn.ReLU) if (end - start) % 2 else is_plain_linear(layers[end])
    ):
        end += 1
    return layers[start:end:2], (end - start) // 2
