"""Linear layers with an activation and dropout, several on one input, and gated: their autograd
Functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import ops, reference
from fastattn.functional._autograd import (
    gradients_again,
    is_batched_gradient,
    kernel,
    may_be_differentiated,
    shape_of,
)
from fastattn.functional.packing import panels_of


class ActivationFunction(torch.autograd.Function):
    """dropout(f(input)), as an autograd Function.

    Saves input; nothing but the seed where f is None. A backward that is differentiated is made of
    torch's operations. Forward mode and torch.func do not come here.

    Args of ``apply``, all by position:
        input: ``[*, N]``, M rows.
        activation: one of ``fastattn.ops.ACTIVATIONS``.
        dropout_p: probability in [0, 1) of dropping an element.
        seed: None, or dropout's seeds, int64 ``[n]``, n a divisor of M.
        backend: ``"native"`` (default), the C++ kernels, or ``"triton"``.

    Returns:
        A tensor of input's shape.

    Raises:
        RuntimeError: the kernel refuses an argument.

    >>> import torch
    >>> from fastattn.functional import ActivationFunction
    >>> ActivationFunction.apply(torch.tensor([-1.0, 3.0]), "relu2", 0.0, None)
    tensor([0., 9.])
    """

    @staticmethod
    def forward(input, activation, dropout_p, seed, backend=ops.NATIVE):
        return kernel(ops.activation_forward, input, activation, dropout_p, seed, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        input, ctx.activation, ctx.dropout_p, seed, *backend = inputs
        ctx.backend = backend[0] if backend else ops.NATIVE
        ctx.set_materialize_grads(False)
        if ctx.activation is None:
            input = shape_of(input)
        ctx.save_for_backward(input, seed)

    @staticmethod
    def backward(ctx, grad_out):
        input, seed = ctx.saved_tensors
        if grad_out is None:
            return (None,) * 5
        if may_be_differentiated() or is_batched_gradient(grad_out):
            options = {"activation": ctx.activation, "dropout_p": ctx.dropout_p, "seed": seed}

            def call(x: Any) -> list[Tensor]:
                return [reference.activation_dropout(x, **options)]

            (grad,) = gradients_again(call, [input], [grad_out], [True])
        else:
            grad = kernel(
                ops.activation_backward,
                grad_out, input, ctx.activation, ctx.dropout_p, seed, ctx.backend,
            )  # fmt: skip
        return grad, None, None, None, None


class LinearFunction(torch.autograd.Function):
    """dropout(f(x Wᵀ + b)) for one weight or several on one input, E21, as an autograd Function.

    Saves x, the weights and, where f has a slope, that slope times dropout's factor. The gradient
    of x is one product for all weights, E22. A backward that is differentiated is made of torch's
    operations. Forward mode and torch.func do not come here: the user's functions call torch's
    operations for them.

    Args of ``apply``, all by position:
        input: ``[*, K]``, M rows.
        activation: one of ``fastattn.ops.ACTIVATIONS``.
        dropout_p: probability in [0, 1) of dropping an element; 0 with several weights.
        seed: None, or dropout's seeds, int64 ``[n]``, n a divisor of M.
        save: whether the gradient will be asked for.
        layers: L, the number of weights.
        parameters: L weights ``[N_l, K]``, then L biases ``[N_l]`` or None.

    Returns:
        L outputs ``[*, N_l]``, then what the backward multiplies their gradients by.

    Raises:
        RuntimeError: a kernel refuses an argument.

    >>> import torch
    >>> from fastattn.functional import LinearFunction
    >>> x, weight, bias = torch.randn(4, 8), torch.randn(12, 8), torch.randn(12)
    >>> out, slope = LinearFunction.apply(x, "gelu", 0.0, None, True, 1, weight, bias)
    >>> out.shape, slope.shape
    (torch.Size([4, 12]), torch.Size([4, 12]))
    """

    @staticmethod
    def forward(input, activation, dropout_p, seed, save, layers, *parameters):
        weights, biases = parameters[:layers], parameters[layers:]
        if any(b is None for b in biases):
            absent = input.new_empty((0,))
            biases = [absent if b is None else b for b in biases]
        return tuple(
            kernel(
                ops.linear_forward,
                input, list(weights), list(biases), activation, dropout_p, seed, save,
                panels_of(list(weights)),
            )
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        input, ctx.activation, ctx.dropout_p, seed, ctx.save, layers, *parameters = inputs
        ctx.layers = layers
        ctx.mark_non_differentiable(*output[layers:])
        ctx.set_materialize_grads(False)
        if ctx.activation is None and not any(ctx.needs_input_grad[6 : 6 + layers]):
            input = shape_of(input)
        ctx.save_for_backward(input, seed, *parameters, *output[layers:])

    @staticmethod
    def backward(ctx, *grads):
        layers = ctx.layers
        input, seed, *rest = ctx.saved_tensors
        parameters, saved = rest[: 2 * layers], rest[2 * layers :]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
        given = [n for n in range(layers) if grads[n] is not None]
        found: list[Tensor | None] = [None] * len(needs)
        if not given:
            return (None,) * (6 + 2 * layers)
        if may_be_differentiated() or is_batched_gradient(grads[given[0]]) or not ctx.save:
            options = {"activation": ctx.activation, "dropout_p": ctx.dropout_p, "seed": seed}

            def call(x: Any, *tensors: Any) -> list[Tensor]:
                pairs = zip(tensors[:layers], tensors[layers:], strict=True)
                return [reference.linear(x, w, b, **options) for w, b in pairs]

            found = gradients_again(call, (input, *parameters), grads[:layers], needs)
        else:
            # Only the layers that have a gradient take part.
            places = [0, *(1 + n for n in given), *(1 + layers + n for n in given)]
            results = kernel(
                ops.linear_backward,
                [grads[n] for n in given], input, [parameters[n] for n in given],
                [saved[n] for n in given], ctx.dropout_p, [needs[n] for n in places],
            )  # fmt: skip
            for place, grad in zip(places, results, strict=True):
                found[place] = grad if needs[place] else None
        return found[0], *[None] * 5, *found[1:]


class GatedLinearFunction(torch.autograd.Function):
    """f(x W_gateᵀ + b_gate)∘(x Wᵀ + b), E23, as an autograd Function.

    Saves x, the weights and two tensors of the output's shape. The gradient of x is one product for
    both weights. For derivatives of the backward, forward mode and torch.func see
    ``LinearFunction``.

    Args of ``apply``, all by position:
        input: ``[*, K]``.
        gate_weight: ``[N, K]``.
        weight: ``[N, K]``.
        gate_bias: ``[N]`` or None.
        bias: ``[N]`` or None.
        activation: one of ``fastattn.ops.ACTIVATIONS``.
        save: whether the gradient will be asked for.

    Returns:
        The output ``[*, N]``, and what the backward multiplies its gradient by for the gate and for
        the other product.

    Raises:
        RuntimeError: a kernel refuses an argument.

    >>> import torch
    >>> from fastattn.functional import GatedLinearFunction
    >>> x, gate, up = torch.randn(4, 8), torch.randn(12, 8), torch.randn(12, 8)
    >>> GatedLinearFunction.apply(x, gate, up, None, None, "silu", True)[0].shape
    torch.Size([4, 12])
    """

    @staticmethod
    def forward(input, gate_weight, weight, gate_bias, bias, activation, save):
        return kernel(
            ops.gated_linear_forward, input, gate_weight, weight, gate_bias, bias, activation, save
        )

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.activation, ctx.save = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx, grad_out, _of_gate, _of_up):
        if grad_out is None:
            return (None,) * 7
        *tensors, of_gate, of_up = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if may_be_differentiated() or is_batched_gradient(grad_out) or not ctx.save:

            def call(*tensors: Any) -> list[Tensor]:
                return [reference.gated_linear(*tensors, activation=ctx.activation)]

            return *gradients_again(call, tensors, [grad_out], needs), None, None
        found = kernel(
            ops.linear_backward,
            [grad_out, grad_out], tensors[0], tensors[1:3], [of_gate, of_up], 0.0, list(needs),
        )  # fmt: skip
        return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None
