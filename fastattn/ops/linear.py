"""Linear and MLP ops: input ``[*, K]``, weight ``[N, K]``, bias ``[N]``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn._call import NATIVE
from fastattn.ops import schemas

# Their places are their numbers in the ops.
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu", "relu2", "quick_gelu")


def activation_forward(
    input: Tensor,
    activation: str | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str = NATIVE,
) -> Tensor:
    """dropout(f(input)), of input's shape ``[*, N]``."""
    number = ACTIVATIONS.index(activation)
    if backend == "triton":
        return torch.ops.fastattn_triton.activation_forward(input, number, dropout_p, seed)
    return torch.ops.fastattn.activation_forward(input, number, dropout_p, seed)


def activation_backward(
    grad_out: Tensor,
    input: Tensor,
    activation: str | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str = NATIVE,
) -> Tensor:
    """The gradient of input. Without an activation only input's shape and dtype matter."""
    number = ACTIVATIONS.index(activation)
    if backend == "triton":
        return torch.ops.fastattn_triton.activation_backward(
            grad_out, input, number, dropout_p, seed
        )
    return torch.ops.fastattn.activation_backward(grad_out, input, number, dropout_p, seed)


def linear_forward(
    input: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str | None,
    dropout_p: float,
    seed: Tensor | None,
    save: bool,
    packed: Sequence[Tensor] = (),
) -> list[Tensor]:
    """dropout(f(x Wᵀ + b)) for L weights on one input: [out_1, ..., out_L, saved_1, ..., saved_L].

    An absent bias has shape ``[0]``. With dropout L is 1. ``saved``, of shape ``[0]`` where the
    backward needs none or ``save`` is False, is what the gradient is multiplied by: without an
    activation and for a ReLU bits, uint8 ``[M, ceil(N / 8)]``; for the others f' and dropout's
    factor in input's dtype, ``[*, N]``. ``packed`` is ``pack_weight`` of each weight, or empty.
    """
    number = ACTIVATIONS.index(activation)
    return torch.ops.fastattn.linear_forward(
        input, weights, biases, packed, number, dropout_p, seed, save
    )


def pack_weight(weight: Tensor) -> Tensor:
    """The weight as the kernels of this processor read it, 1-D, of the accumulator's dtype."""
    return torch.ops.fastattn.pack_weight(weight)


def gated_linear_forward(
    input: Tensor,
    gate_weight: Tensor,
    weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """f(x W_gateᵀ + b_gate)∘(x Wᵀ + b), and what its gradient is multiplied by for the gate and for
    the other product; these have shape ``[0]`` where ``save`` is False."""
    number = ACTIVATIONS.index(activation)
    return torch.ops.fastattn.gated_linear_forward(
        input, gate_weight, weight, gate_bias, bias, number, save
    )


def linear_backward(
    grads: list[Tensor],
    input: Tensor,
    weights: list[Tensor],
    saved: list[Tensor],
    dropout_p: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of input, the L weights, the L biases; one that is not needed has shape ``[0]``."""
    return torch.ops.fastattn.linear_backward(grads, input, weights, saved, dropout_p, needs)


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


def _out(input, weight):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _bits(input, weight):
    rows = 1
    for extent in input.shape[:-1]:
        rows = rows * extent
    return input.new_empty((rows, (weight.shape[0] + 7) // 8), dtype=torch.uint8)


def _fake_activation_forward(input, activation, dropout_p, seed):
    return input.new_empty(input.shape)


def _fake_activation_backward(grad_out, input, activation, dropout_p, seed):
    return input.new_empty(input.shape)


def _fake_linear_forward(input, weights, biases, packed, activation, dropout_p, seed, save):
    outs = [_out(input, w) for w in weights]
    if not save or (activation == 0 and dropout_p == 0.0):
        return outs + [input.new_empty((0,)) for _ in weights]
    return outs + [(_bits if activation <= 1 else _out)(input, w) for w in weights]


def _fake_pack_weight(weight):
    size = torch.library.get_ctx().new_dynamic_size()  # it depends on the processor
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty((size,), dtype=wide)


def _fake_gated_linear_forward(input, gate_weight, weight, gate_bias, bias, activation, save):
    saved = [_out(input, weight) if save else input.new_empty((0,)) for _ in range(2)]
    return _out(input, weight), *saved


def _fake_forward(input, weight, bias):
    return _out(input, weight), _bits(input, weight)


def _fake_jvp(input, weight, mask, t_input, t_weight, t_bias):
    return _out(input, weight)


def _fake_backward(grad_out, input, weight, mask, needs):
    shapes = (input.shape, weight.shape, (weight.shape[0],))
    return tuple(
        input.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True)
    )


def _fake_mlp_forward(input, weights, biases):
    activations = [_out(input, w) for w in weights]
    return [activations[-1], *activations[:-1]]


def _fake_mlp_inference(input, weights, biases):
    return _out(input, weights[-1])


def _fake_linear_backward(grads, input, weights, saved, dropout_p, needs):
    return _fake_mlp_backward(grads, input, weights, saved, needs)


def _fake_mlp_backward(grad_out, input, weights, hidden, needs):
    shapes = [input.shape, *(w.shape for w in weights), *((w.shape[0],) for w in weights)]
    return [input.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True)]


for _ns in schemas.NAMESPACES:
    torch.library.register_fake(f"{_ns}::activation_forward", _fake_activation_forward)
    torch.library.register_fake(f"{_ns}::activation_backward", _fake_activation_backward)
    torch.library.register_fake(f"{_ns}::linear_relu_forward", _fake_forward)
    torch.library.register_fake(f"{_ns}::linear_relu_backward", _fake_backward)
    torch.library.register_fake(f"{_ns}::linear_relu_jvp", _fake_jvp)
torch.library.register_fake("fastattn::pack_weight", _fake_pack_weight)
torch.library.register_fake("fastattn::linear_forward", _fake_linear_forward)
torch.library.register_fake("fastattn::gated_linear_forward", _fake_gated_linear_forward)
torch.library.register_fake("fastattn::linear_backward", _fake_linear_backward)
torch.library.register_fake("fastattn::mlp_forward", _fake_mlp_forward)
torch.library.register_fake("fastattn::mlp_inference", _fake_mlp_inference)
torch.library.register_fake("fastattn::mlp_backward", _fake_mlp_backward)
