"""Linear layers, alone and with an activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import functional
from fastattn.functional import _validate, inference
from fastattn.functional._served import (
    is_torchs_product,
    ordinary,
    product_wins,
    serves_layers,
    unobserved,
)
from fastattn.functional.packing import packing
from fastattn.nn._plain import (
    as_written,
    is_plain,
    run_torchs,
    scripted_as,
)


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
        if packing():
            return functional.linear(input, weight, bias)
        if inference.applies(input):
            return inference.linear(input, weight, bias)
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


class _PlainLinearActivation(nn.Linear):
    """What TorchScript compiles for LinearActivation."""

    if TYPE_CHECKING:  # TorchScript knows no annotation of its own attributes
        activation: str
        p: float

    def forward(self, input: Tensor) -> Tensor:
        z = F.linear(input, self.weight, self.bias)
        if self.activation == "relu":
            z = torch.relu(z)
        elif self.activation == "gelu":
            z = F.gelu(z)
        elif self.activation == "gelu_tanh":
            z = F.gelu(z, approximate="tanh")
        elif self.activation == "silu":
            z = F.silu(z)
        elif self.activation == "relu2":
            z = torch.relu(z).square()
        elif self.activation == "quick_gelu":
            z = z * torch.sigmoid(1.702 * z)
        return F.dropout(z, self.p, self.training)


class LinearActivation(nn.Linear):
    """``dropout(activation(x Wᵀ + b))`` as one kernel; ``torch.nn.Linear``'s parameters.

    Args:
        in_features: size of an input row.
        out_features: size of an output row.
        activation: its name in ``fastattn.linear``, but not None.
        p: probability of dropping an element in training.
        bias: learn a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an unknown activation, or p outside [0, 1].

    >>> import torch, fastattn
    >>> layer, input = fastattn.nn.LinearActivation(8, 3, "silu"), torch.randn(4, 8)
    >>> expected = torch.nn.functional.silu(input @ layer.weight.T + layer.bias)
    >>> torch.allclose(layer(input), expected, atol=1e-5)
    True
    """

    __prepare_scriptable__ = scripted_as(_PlainLinearActivation)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "gelu",
        p: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        _validate.activation(activation, optional=False)
        self.activation = activation
        self.p: float = _validate.probability("p", p)

    def forward(self, input: Tensor) -> Tensor:
        """dropout(activation(input Wᵀ + b)).

        Args:
            input: ``[..., in_features]``, of the parameters' dtype.

        Returns:
            ``[..., out_features]``.
        """
        p = self.p if self.training else 0.0
        if not (
            unobserved()
            and ordinary(input, exported=True)
            and ordinary(self.weight, self.bias, exported=True)
        ):
            z = super().forward(input)
            z = functional.activation_dropout(z, self.activation, backend="reference")
            return F.dropout(z, p)
        return functional.linear(input, self.weight, self.bias, self.activation, p)

    def extra_repr(self) -> str:
        """What ``print`` shows of the module."""
        return f"{super().extra_repr()}, activation={self.activation!r}, p={self.p}"


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling ``module`` is ``nn.Linear``'s product and nothing else."""
    ours = type(module) is Linear and is_plain(module, Linear) and as_written(nn.Linear)
    return ours or is_plain(module, nn.Linear)
