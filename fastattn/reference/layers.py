"""Linear layers: with a ReLU, E15-E17, with any activation and dropout, E21, and gated, E23."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.reference.norm import keep_factor


def _identity(z: Tensor) -> Tensor:
    return z


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _relu2(z: Tensor) -> Tensor:
    return torch.relu(z).square()


def _quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: _identity,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu2": _relu2,
    "quick_gelu": _quick_gelu,
}


def activation(name: str | None) -> Callable[[Tensor], Tensor]:
    """The activation f of E21, differentiable by autograd.

    Args:
        name: None, ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"relu2"`` or
            ``"quick_gelu"``.

    >>> activation("relu2")(torch.tensor([-1.0, 3.0]))
    tensor([0., 9.])
    """
    return _ACTIVATIONS[name]


def activation_dropout(
    input: Tensor,
    *,
    activation: str | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Z∘f(x), differentiable by autograd.

    Args:
        input: ``[*, N]``.
        activation: the name of f, see ``activation``.
        dropout_p: probability of dropping an element.
        seed: dropout's seeds, see ``keep_factor``.

    >>> activation_dropout(torch.tensor([-1.0, 3.0]), activation="relu2")
    tensor([0., 9.])
    """
    out = _ACTIVATIONS[activation](input)
    factor = keep_factor(out, seed, dropout_p)
    return out if factor is None else out * factor


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Z∘f(x Wᵀ + b), E21, differentiable by autograd.

    Args:
        input, weight, bias: see ``fastattn.reference``.
        activation: the name of f, see ``activation``.
        dropout_p: probability of dropping an element.
        seed: dropout's seeds, see ``keep_factor``.

    Returns:
        ``[*, N]``.

    >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), activation="relu2")
    tensor([[9.]])
    """
    return activation_dropout(
        F.linear(input, weight, bias), activation=activation, dropout_p=dropout_p, seed=seed
    )


def gated_linear(
    input: Tensor,
    gate_weight: Tensor,
    weight: Tensor,
    gate_bias: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
) -> Tensor:
    """f(x W_gateᵀ + b_gate)∘(x Wᵀ + b), E23, differentiable by autograd.

    Args:
        input, weight, bias: see ``fastattn.reference``.
        gate_weight: ``[N, K]``.
        gate_bias: ``[N]`` or None.
        activation: the name of f, see ``activation``.

    Returns:
        ``[*, N]``.

    >>> x, gate, up = torch.ones(1, 1), torch.tensor([[2.0]]), torch.tensor([[3.0]])
    >>> gated_linear(x, gate, up, activation="relu")
    tensor([[6.]])
    """
    gate = _ACTIVATIONS[activation](F.linear(input, gate_weight, gate_bias))
    return gate * F.linear(input, weight, bias)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(x Wᵀ + b), E15, differentiable by autograd.

    Args:
        input, weight, bias: see ``fastattn.reference``.

    Returns:
        ``[*, N]``.

    >>> linear_relu(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
    tensor([[3., 0.]])
    """
    return torch.relu(F.linear(input, weight, bias))


def linear_relu_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output, and R of E15, bool ``[*, N]``: not (output <= 0), so that a NaN passes its
    gradient.

    Args:
        input, weight, bias: see ``fastattn.reference``.

    >>> linear_relu_forward(torch.tensor([[1.0]]), torch.tensor([[2.0], [-2.0]]))
    (tensor([[2., 0.]]), tensor([[ True, False]]))
    """
    with torch.no_grad():
        out = linear_relu(input, weight, bias)
        return out, ~(out <= 0)


def linear_relu_backward(
    grad_out: Tensor, input: Tensor, weight: Tensor, passes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias, E16.

    Args:
        grad_out: the cotangent of the output, ``[*, N]``.
        input, weight, passes: see ``fastattn.reference``.

    >>> grad_out, input, weight = torch.ones(4, 3), torch.ones(4, 2), torch.ones(3, 2)
    >>> passes = torch.tensor([True, False, True]).expand(4, 3)
    >>> linear_relu_backward(grad_out, input, weight, passes)[2]
    tensor([4., 0., 4.])
    """
    with torch.no_grad():
        g = torch.where(passes, grad_out, 0.0)
        rows = g.reshape(math.prod(g.shape[:-1]), g.shape[-1])
        return g @ weight, rows.T @ input.reshape(rows.shape[0], input.shape[-1]), rows.sum(0)


def linear_relu_jvp(
    input: Tensor,
    weight: Tensor,
    passes: Tensor,
    t_input: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
) -> Tensor:
    """The output's tangent, E17.

    Args:
        input, weight, passes: see ``fastattn.reference``.
        t_input: the tangent of input, ``[*, K]``, or None for 0.
        t_weight: the tangent of weight, ``[N, K]``, or None for 0.
        t_bias: the tangent of bias, ``[N]``, or None for 0.

    >>> input, weight, passes = torch.ones(4, 2), torch.ones(3, 2), torch.ones(4, 3) > 0
    >>> linear_relu_jvp(input, weight, passes, None, None, torch.ones(3)).shape
    torch.Size([4, 3])
    """
    with torch.no_grad():
        t = input.new_zeros(passes.shape)
        if t_input is not None:
            t = t + t_input @ weight.T
        if t_weight is not None:
            t = t + input @ t_weight.T
        if t_bias is not None:
            t = t + t_bias
        return torch.where(passes, t, 0.0)


def mlp(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Linear-ReLU-...-Linear, no ReLU after the last, differentiable by autograd.

    Args:
        input: ``[*, N_0]``.
        weights: L tensors ``[N_l, N_{l-1}]``.
        biases: L tensors ``[N_l]`` or Nones.

    Returns:
        ``[*, N_L]``.

    >>> mlp(torch.randn(4, 8), [torch.randn(6, 8), torch.randn(3, 6)], [None, None]).shape
    torch.Size([4, 3])
    """
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        input = linear_relu(input, weight, bias)
    return F.linear(input, weights[-1], biases[-1])
