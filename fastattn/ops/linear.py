"""Linear+ReLU and MLP ops: input ``[*, K]``, weight ``[N, K]``, bias ``[N]``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn._call import NATIVE
from fastattn.ops import schemas


def linear_relu_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, backend: str = NATIVE
) -> tuple[Tensor, Tensor]:
    """out ``[*, N]`` and its ReLU bit-mask, uint8 ``[M, ceil(N / 8)]`` with M rows of input."""
    if backend == "triton":
        return torch.ops.fastattn_triton.linear_relu_forward(input, weight, bias)
    return torch.ops.fastattn.linear_relu_forward(input, weight, bias)


def linear_relu_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    needs: Sequence[bool],
    backend: str = NATIVE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; one that is not needed has shape ``[0]``."""
    if backend == "triton":
        return torch.ops.fastattn_triton.linear_relu_backward(grad_out, input, weight, mask, needs)
    return torch.ops.fastattn.linear_relu_backward(grad_out, input, weight, mask, needs)


def linear_relu_jvp(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    t_input: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    backend: str = NATIVE,
) -> Tensor:
    """The output's tangent. Each input's tangent has the input's shape or is None for 0; at least
    one is given."""
    if backend == "triton":
        return torch.ops.fastattn_triton.linear_relu_jvp(
            input, weight, mask, t_input, t_weight, t_bias
        )
    return torch.ops.fastattn.linear_relu_jvp(input, weight, mask, t_input, t_weight, t_bias)


def mlp_forward(input: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """[out, h_1, ..., h_{L-1}]: the output and the hidden activations; an absent bias has shape
    ``[0]``."""
    return torch.ops.fastattn.mlp_forward(input, weights, biases)


def mlp_inference(input: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """``mlp_forward``'s out alone; the hidden activations are never there whole."""
    return torch.ops.fastattn.mlp_inference(input, weights, biases)


def mlp_backward(
    grad_out: Tensor,
    input: Tensor,
    weights: list[Tensor],
    hidden: list[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of input, the L weights, the L biases; one that is not needed has shape ``[0]``."""
    return torch.ops.fastattn.mlp_backward(grad_out, input, weights, hidden, needs)


def _fake_forward(input, weight, bias):
    rows = 1
    for extent in input.shape[:-1]:
        rows = rows * extent
    out = input.new_empty((*input.shape[:-1], weight.shape[0]))
    return out, input.new_empty((rows, (weight.shape[0] + 7) // 8), dtype=torch.uint8)


def _fake_jvp(input, weight, mask, t_input, t_weight, t_bias):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_backward(grad_out, input, weight, mask, needs):
    shapes = (input.shape, weight.shape, (weight.shape[0],))
    return tuple(
        input.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True)
    )


def _fake_mlp_forward(input, weights, biases):
    activations = [input.new_empty((*input.shape[:-1], w.shape[0])) for w in weights]
    return [activations[-1], *activations[:-1]]


def _fake_mlp_inference(input, weights, biases):
    return input.new_empty((*input.shape[:-1], weights[-1].shape[0]))


def _fake_mlp_backward(grad_out, input, weights, hidden, needs):
    shapes = [input.shape, *(w.shape for w in weights), *((w.shape[0],) for w in weights)]
    return [input.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True)]


for _ns in schemas.NAMESPACES:
    torch.library.register_fake(f"{_ns}::linear_relu_forward", _fake_forward)
    torch.library.register_fake(f"{_ns}::linear_relu_backward", _fake_backward)
    torch.library.register_fake(f"{_ns}::linear_relu_jvp", _fake_jvp)
torch.library.register_fake("fastattn::mlp_forward", _fake_mlp_forward)
torch.library.register_fake("fastattn::mlp_inference", _fake_mlp_inference)
torch.library.register_fake("fastattn::mlp_backward", _fake_mlp_backward)
