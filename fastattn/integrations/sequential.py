"""``nn.Sequential`` with its stretches of Linear and ReLU in fastattn's kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastattn import functional
from fastattn.nn.linear import is_plain


class FusedSequential(nn.Sequential):
    """Runs Linear, ReLU, ... stretches of its children as one kernel each.

    What is fused is decided at each call, and the children stay what they are: called alone, sliced
        out, hooked, replaced or reparametrized later, each means what it meant before.
    """

    def forward(self, input: Tensor) -> Tensor:
        layers = list(self)
        x, i = input, 0
        while i < len(layers):
            pairs = linear_relu_pairs(layers, i)
            after = i + 2 * pairs
            if pairs and after < len(layers) and is_plain(layers[after], nn.Linear):
                linears = layers[i : after + 1 : 2]
                x = functional.mlp(x, [m.weight for m in linears], [m.bias for m in linears])
                i = after + 1
            elif pairs:
                for linear in layers[i:after:2]:
                    x = functional.linear_relu(x, linear.weight, linear.bias)
                i = after
            else:
                x = layers[i](x)
                i += 1
        return x


def linear_relu_pairs(layers: Sequence[nn.Module], start: int) -> int:
    """How many times plain Linear, plain ReLU follow each other from ``start`` on."""
    i = start
    while (
        i + 1 < len(layers) and is_plain(layers[i], nn.Linear) and is_plain(layers[i + 1], nn.ReLU)
    ):
        i += 2
    return (i - start) // 2
