"""Linear layers with a ReLU, E15-E17."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(x Wᵀ + b), E15: input ``[*, K]``, weight ``[N, K]``, bias ``[N]`` -> ``[*, N]``."""
    return torch.relu(torch.nn.functional.linear(input, weight, bias))


def linear_relu_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output and R of E15, bool ``[*, N]``: not (output <= 0), so that a NaN passes its
    gradient."""
    with torch.no_grad():
        out = linear_relu(input, weight, bias)
        return out, ~(out <= 0)


def linear_relu_backward(
    grad_out: Tensor, input: Tensor, weight: Tensor, passes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias, E16."""
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
    """The output's tangent, E17; a tangent of None is 0."""
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
    """Linear-ReLU-...-Linear, no ReLU after the last: weights ``[N_l, N_{l-1}]``, biases ``[N_l]``
    or None."""
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        input = linear_relu(input, weight, bias)
    return torch.nn.functional.linear(input, weights[-1], biases[-1])
