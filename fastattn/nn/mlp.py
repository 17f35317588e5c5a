"""Linear layers, stacked and gated."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.functional import _validate
from fastattn.functional._served import ordinary, unobserved
from fastattn.nn._plain import (
    fused_activation,
    no_global_hooks,
    scripted_as,
)
from fastattn.nn.dropout import active_dropout, is_plain_dropout
from fastattn.nn.linear import is_plain_linear


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) · up(x))``, with both products of x in one kernel; the parameters
    are named as in Hugging Face's Llama: ``gate_proj``, ``up_proj`` and ``down_proj``.

    Args:
        in_features: size of an input row, and of an output row unless ``out_features`` says more.
        hidden_features: width of what lies between.
        out_features: size of an output row.
        activation: as in ``fastattn.linear``; None is the bilinear layer.
        bias: learn a bias in every layer.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an unknown activation.

    >>> import torch, fastattn
    >>> block = fastattn.nn.GatedMLP(8, 24)
    >>> block(torch.randn(4, 8)).shape, list(block.state_dict())
    (torch.Size([4, 8]), ['gate_proj.weight', 'up_proj.weight', 'down_proj.weight'])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: str | None = "silu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _validate.activation(activation)
        self.activation = activation
        options: Any = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(in_features, hidden_features, **options)
        self.up_proj = nn.Linear(in_features, hidden_features, **options)
        self.down_proj = nn.Linear(hidden_features, out_features or in_features, **options)

    def forward(self, input: Tensor) -> Tensor:
        """The gated product, then the layer below.

        Args:
            input: ``[..., in_features]``, of the parameters' dtype.

        Returns:
            ``[..., out_features]``.
        """
        gate, up = self.gate_proj, self.up_proj
        parameters = (gate.weight, up.weight, gate.bias, up.bias)
        if not (
            is_plain_linear(gate)
            and is_plain_linear(up)
            and no_global_hooks()
            and unobserved()
            and ordinary(input, exported=True)
            and ordinary(*parameters, exported=True)
        ):
            name = self.activation
            gated = functional.activation_dropout(gate(input), name, backend="reference")
            return self.down_proj(gated * up(input))
        hidden = functional.gated_mlp(
            input, gate.weight, up.weight, None, gate.bias, up.bias, activation=self.activation
        )
        return self.down_proj(hidden)

    def extra_repr(self) -> str:
        """What ``print`` shows of the module."""
        return f"activation={self.activation!r}"


class _Layer(NamedTuple):
    """A Linear and what follows it in an MLP."""

    linear: nn.Linear
    activation: str | None
    dropout: nn.Dropout | None


_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
}


class MLP(nn.Sequential):
    """Linear-activation-dropout-...-Linear, by default Linear-ReLU-...-Linear as one autograd node.

    It is the ``nn.Sequential(Linear, ReLU, Linear, ...)`` of the same layers and has its state_dict
    keys: ``0.weight``, ``0.bias``, ``2.weight``, ...; with dropout ``3.weight``, ...

    Args:
        in_features: size of an input row.
        hidden_features: the width of the hidden layer, or the widths of several.
        out_features: size of an output row.
        bias: learn a bias in every layer.
        device: of the parameters.
        dtype: of the parameters.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        p: probability of dropping an element between the layers in training. With 0 there is no
            ``nn.Dropout``.

    Raises:
        ValueError: an unknown activation, or p outside [0, 1].

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
        activation: str = "relu",
        p: float = 0.0,
    ) -> None:
        if activation not in _MODULES:
            known = ", ".join(map(repr, _MODULES))
            raise ValueError(f"activation: expected one of {known}, got {activation!r}")
        p = _validate.probability("p", p)
        hidden = [hidden_features] if isinstance(hidden_features, int) else list(hidden_features)
        widths = [in_features, *hidden, out_features]
        layers: list[nn.Module] = []
        for number, (n_in, n_out) in enumerate(pairwise(widths)):
            if number > 0:
                layers.append(_MODULES[activation]())
                layers += [nn.Dropout(p)] if p > 0.0 else []
            layers.append(nn.Linear(n_in, n_out, bias=bias, device=device, dtype=dtype))
        super().__init__(*layers)

    @staticmethod
    def fits(sequential: nn.Sequential) -> bool:
        """Whether ``from_sequential`` takes a Sequential.

        Args:
            sequential: the module in question; it is not run.

        Returns:
            True for Linear, activation, ..., Linear with at least one activation, an ``nn.Dropout``
            behind it or not, and no hooks on these layers.

        >>> import fastattn
        >>> from torch import nn
        >>> fastattn.nn.MLP.fits(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
        True
        """
        return _layers(sequential) is not None

    @classmethod
    def from_sequential(cls, sequential: nn.Sequential) -> MLP:
        """An MLP of a Sequential's own layers: the same Parameter objects under the same keys.

        Args:
            sequential: Linear, activation, ..., Linear, see ``fits``.

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
                "sequential: expected Linear, activation, ..., Linear without hooks, got "
                f"{sequential}"
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
        layers = _layers(self)
        if layers is None or not (
            no_global_hooks() and unobserved() and ordinary(input, exported=True)
        ):
            return super().forward(input)  # what was put in since is called as in nn.Sequential
        weights: list[Any] = [layer.linear.weight for layer in layers]
        biases: list[Any] = [layer.linear.bias for layer in layers]
        if not ordinary(*weights, *biases, exported=True):
            return super().forward(input)
        dropouts = [layer.dropout for layer in layers]
        drops = [0.0 if m is None else active_dropout(m) or 0.0 for m in dropouts]
        if not any(drops) and all(layer.activation == "relu" for layer in layers[:-1]):
            return functional.mlp(input, weights, biases)
        for layer, weight, bias, p in zip(layers, weights, biases, drops, strict=True):
            input = functional.linear(input, weight, bias, layer.activation, p)
        return input


def _layers(sequential: nn.Sequential) -> list[_Layer] | None:
    """The layers of Linear, activation, [Dropout], ..., Linear with at least one activation; None
    for another stack."""
    layers: list[_Layer] = []
    for module in sequential:
        if isinstance(module, nn.Linear) and is_plain_linear(module):
            if layers and layers[-1].activation is None:
                return None
            layers.append(_Layer(module, None, None))
            continue
        if not layers:
            return None
        last = layers[-1]
        if isinstance(module, nn.Dropout) and is_plain_dropout(module):
            if last.activation is None or last.dropout is not None:
                return None
            layers[-1] = last._replace(dropout=module)
            continue
        name = fused_activation(module)
        if name is None or last.activation is not None:
            return None
        layers[-1] = last._replace(activation=name)
    good = len(layers) > 1 and layers[-1].activation is None
    return layers if good else None
