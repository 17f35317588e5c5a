"""Linear layers, with a ReLU, and stacked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import functional
from fastattn.functional._served import (
    is_torchs_product,
    ordinary,
    product_wins,
    serves_layers,
    unobserved,
)
from fastattn.nn._plain import as_written, is_plain, no_global_hooks, run_torchs, scripted_as


class Linear(nn.Linear):
    """``torch.nn.Linear``: its arguments, state_dict and values.

    A call takes the kernels where they are faster than torch's own product, in the dtype in which
    it is computed, autocast's included; ``fastattn.backends.explain("linear", input, weight)`` says
    where that is. Else it is torch's.
    """

    __prepare_scriptable__ = scripted_as(nn.Linear)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        if is_torchs_product(input, self.out_features):
            return super().forward(input)
        if not (as_written(nn.Linear) and unobserved() and ordinary(input)):
            return run_torchs(self, super().forward, input)
        weight, bias = self.weight, self.bias
        if not product_wins(input, weight) or not serves_layers(input, [weight], [bias]):
            return super().forward(input)
        return functional.mlp(input, [weight], [bias])


class _PlainLinearReLU(nn.Linear):
    """What TorchScript compiles for LinearReLU."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(F.linear(input, self.weight, self.bias))


class LinearReLU(nn.Linear):
    """``relu(x Wᵀ + b)`` in one kernel; ``torch.nn.Linear``'s arguments and state_dict."""

    __prepare_scriptable__ = scripted_as(_PlainLinearReLU)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        if not (
            unobserved()
            and ordinary(input, exported=True)
            and ordinary(self.weight, self.bias, exported=True)
        ):
            return torch.relu(super().forward(input))
        return functional.linear_relu(input, self.weight, self.bias)


class MLP(nn.Sequential):
    """Linear-ReLU-...-Linear as one autograd node.

    ``MLP(784, 128, 10)`` or ``MLP(784, [256, 128], 10)``. It is the ``nn.Sequential(Linear, ReLU,
    Linear, ...)`` of the same layers and has its state_dict keys: ``0.weight``, ``0.bias``,
    ``2.weight``, ...
    """

    __prepare_scriptable__ = scripted_as(nn.Sequential)

    def __init__(
        self,
        in_features: int,
        hidden_features: int | Sequence[int],
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        hidden = [hidden_features] if isinstance(hidden_features, int) else list(hidden_features)
        widths = [in_features, *hidden, out_features]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out, bias=bias, device=device, dtype=dtype), nn.ReLU()]
        super().__init__(*layers[:-1])

    @staticmethod
    def fits(sequential: nn.Sequential) -> bool:
        """Whether it is Linear, ReLU, ..., Linear, with a ReLU at least and no hooks on these."""
        children = list(sequential)
        return (
            len(children) >= 3
            and len(children) % 2 == 1
            and all(map(is_plain_linear, children[::2]))
            and all(is_plain(m, nn.ReLU) for m in children[1::2])
        )

    @classmethod
    def from_sequential(cls, sequential: nn.Sequential) -> MLP:
        """An MLP of ``sequential``'s own layers: the same Parameter objects under the same keys.

        Raises ValueError unless it is Linear, ReLU, ..., Linear without hooks on these.
        """
        if not isinstance(sequential, nn.Sequential) or not cls.fits(sequential):
            raise ValueError(
                f"sequential: expected Linear, ReLU, ..., Linear without hooks, got {sequential}"
            )
        shared = cls.__new__(cls)
        nn.Sequential.__init__(shared, OrderedDict(sequential._modules))
        shared.training = sequential.training
        return shared

    def __getitem__(self, idx: int | slice) -> nn.Module:
        """A layer, or for a slice an ``nn.Sequential`` of layers, which need not be an MLP."""
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        if not (
            MLP.fits(self) and no_global_hooks() and unobserved() and ordinary(input, exported=True)
        ):
            return super().forward(input)  # what was put in since is called as in nn.Sequential
        layers: list[Any] = list(self)[::2]
        weights, biases = [m.weight for m in layers], [m.bias for m in layers]
        if not ordinary(*weights, *biases, exported=True):
            return super().forward(input)
        return functional.mlp(input, weights, biases)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling ``module`` is ``nn.Linear``'s product and nothing else."""
    ours = type(module) is Linear and is_plain(module, Linear) and as_written(nn.Linear)
    return ours or is_plain(module, nn.Linear)
