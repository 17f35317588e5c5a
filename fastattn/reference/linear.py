"""Linear layers with a ReLU, E15-E17."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(x Wᵀ + b), E15, differentiable by autograd.

    Args:
        input, weight, bias: see ``fastattn.reference``.

    Returns:
        ``[*, N]``.

    >>> linear_relu(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
    tensor([[3., 0.]])
    """
    return torch.relu(torch.nn.functional.linear(input, weight, bias))


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
    return torch.nn.functional.linear(input, weights[-1], biases[-1])
