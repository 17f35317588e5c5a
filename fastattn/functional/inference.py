"""Linear layers by the kernels without autograd, for a caller that knew before the call that the
sizes and dtypes are the kernels'.

The functions of ``drop_in`` decide that at each call, and make an autograd node where one is
needed. Of a short query's time that is a part. The functions here ask only what no guard of a
captured graph tells: whether somebody watches, records, transforms or differentiates the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn import backends, ops
from fastattn.functional import drop_in, packing
from fastattn.functional._autograd import kernel, transforming
from fastattn.functional._torch_internals import watched


def applies(input: Tensor) -> bool:
    """Whether a module that serves ``input`` may call a function below: on a CPU, where nothing is
    differentiated, no autocast changes dtypes, and no backend is named."""
    return (
        input.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not backends.named(None)
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``drop_in.linear``."""
    if not _direct():
        return drop_in.linear(input, weight, bias)
    return kernel(ops.mlp_inference, input, [weight], _given([bias], input))


def linear_activation(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, dropout_p: float
) -> Tensor:
    """``drop_in.linear_activation``, for a ``dropout_p`` of 0."""
    if dropout_p > 0.0 or not _direct():
        return drop_in.linear_activation(input, weight, bias, activation, dropout_p)
    return _forward(input, [weight], [bias], activation)[0]


def multi_linear(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """``drop_in.multi_linear``."""
    if not _direct():
        return drop_in.multi_linear(input, weights, biases)
    return _forward(input, list(weights), biases, None)[: len(weights)]


def _forward(
    input: Tensor, weights: list[Tensor], biases: Sequence[Tensor | None], activation: str | None
) -> Sequence[Tensor]:
    given = (input, weights, _given(biases, input), activation)
    return kernel(ops.linear_forward, *given, 0.0, None, False, [])


def _given(biases: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """As the ops take them: an absent bias has shape ``[0]``."""
    return [like.new_empty((0,)) if bias is None else bias for bias in biases]


def _direct() -> bool:
    """Whether an op may be called with nothing around it."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or transforming()
        or packing.enabled()
        or watched()
    )
