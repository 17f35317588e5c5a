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

    A call takes the kernels where they are faster than torch's own product in the dtype of the
    call, autocast's included; ``fastattn.backends.explain("linear", input, weight)`` says where
    that is. Every other call is torch's.

    Args:
        in_features: size of an input row.
        out_features: size of an output row.
        bias: learn a bias.
        device: of the parameters.
        dtype: of the parameters.

    >>> import torch, fastattn
    >>> fastattn.nn.Linear(8, 3)(torch.randn(4, 8)).shape
    torch.Size([4, 3])
    """

    __prepare_scriptable__ = scripted_as(nn.Linear)

    def forward(self, input: Tensor) -> Tensor:
        """input Wᵀ + b.

        Args:
            input: ``[..., in_features]``, of the parameters' dtype.

        Returns:
            ``[..., out_features]``.
        """
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
    """``relu(x Wᵀ + b)`` as one kernel; ``torch.nn.Linear``'s arguments and state_dict.

    Args:
        in_features: size of an input row.
        out_features: size of an output row.
        bias: learn a bias.
        device: of the parameters.
        dtype: of the parameters.

    >>> import torch, fastattn
    >>> layer, input = fastattn.nn.LinearReLU(8, 3), torch.randn(4, 8)
    >>> torch.allclose(layer(input), torch.relu(input @ layer.weight.T + layer.bias), atol=1e-5)
    True
    """

    __prepare_scriptable__ = scripted_as(_PlainLinearReLU)

    def forward(self, input: Tensor) -> Tensor:
        """relu(input Wᵀ + b).

        Args:
            input: ``[..., in_features]``, of the parameters' dtype.

        Returns:
            ``[..., out_features]``.
        """
        if not (
            unobserved()
            and ordinary(input, exported=True)
            and ordinary(self.weight, self.bias, exported=True)
        ):
            return torch.relu(super().forward(input))
        return functional.linear_relu(input, self.weight, self.bias)


class MLP(nn.Sequential):
    """Linear-ReLU-...-Linear as one autograd node.

    It is the ``nn.Sequential(Linear, ReLU, Linear, ...)`` of the same layers and has its state_dict
    keys: ``0.weight``, ``0.bias``, ``2.weight``, ...

    Args:
        in_features: size of an input row.
        hidden_features: the width of the hidden layer, or the widths of several.
        out_features: size of an output row.
        bias: learn a bias in every layer.
        device: of the parameters.
        dtype: of the parameters.

    >>> import torch, fastattn
    >>> network = fastattn.nn.MLP(784, [256, 128], 10)
    >>> network(torch.randn(32, 784)).shape, list(network.state_dict())[:2]
    (torch.Size([32, 10]), ['0.weight', '0.bias'])
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
        """Whether ``from_sequential`` takes a Sequential.

        Args:
            sequential: the module in question; it is not run.

        Returns:
            True for Linear, ReLU, ..., Linear with at least one ReLU and no hooks on these layers.

        >>> import fastattn
        >>> from torch import nn
        >>> fastattn.nn.MLP.fits(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
        True
        """
        children = list(sequential)
        return (
            len(children) >= 3
            and len(children) % 2 == 1
            and all(map(is_plain_linear, children[::2]))
            and all(is_plain(m, nn.ReLU) for m in children[1::2])
        )

    @classmethod
    def from_sequential(cls, sequential: nn.Sequential) -> MLP:
        """An MLP of a Sequential's own layers: the same Parameter objects under the same keys.

        Args:
            sequential: Linear, ReLU, ..., Linear, see ``fits``.

        Returns:
            The MLP, in the mode (training or evaluation) of ``sequential``.

        Raises:
            ValueError: ``sequential`` has another form, or a hook on one of its layers.

        >>> import fastattn
        >>> from torch import nn
        >>> layers = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> fastattn.nn.MLP.from_sequential(layers)[0] is layers[0]
        True
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
        """A layer; for a slice an ``nn.Sequential`` of layers, which need not be an MLP."""
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def forward(self, input: Tensor) -> Tensor:
        """The layers, one after the other.

        Args:
            input: ``[..., in_features]``, of the parameters' dtype.

        Returns:
            ``[..., out_features]``.
        """
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
