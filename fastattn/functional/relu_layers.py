"""Linear+ReLU and the MLP of such layers: their autograd Functions, and ``linear_relu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import backends, ops, reference
from fastattn.functional import _validate
from fastattn.functional._autograd import (
    apply,
    autocast,
    gradients_again,
    is_batched_gradient,
    kernel,
    may_be_differentiated,
    save_for_forward,
    shape_of,
    transforming,
    without_autocast,
)
from fastattn.functional.linear_derivatives import (
    batched_linear_relu,
    linear_relu_gradients,
    linear_relu_tangent,
)


class LinearReLUFunction(torch.autograd.Function):
    """relu(x Wᵀ + b) by the kernels, as an autograd Function.

    The output can be differentiated any number of times in every mode. Saves x, W and one bit an
    output element; no x where W is frozen.

    Args of ``apply``, all by position:
        input: ``[*, K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        backend: ``"native"`` (default), the C++ or CUDA kernels of the tensors' device, or
            ``"triton"``.

    Returns:
        The output ``[*, N]``, and the ReLU's bits, uint8 ``[M, ceil(N / 8)]`` for the M rows of
        input: bit n % 8 of byte n // 8 is set where output n is not <= 0.

    Raises:
        RuntimeError: a kernel refuses an argument.

    >>> import torch
    >>> from fastattn.functional import LinearReLUFunction
    >>> input, weight, bias = torch.randn(4, 8), torch.randn(12, 8), torch.randn(12)
    >>> out, bits = LinearReLUFunction.apply(input, weight, bias)
    >>> out.shape, bits.shape
    (torch.Size([4, 12]), torch.Size([4, 2]))
    """

    @staticmethod
    def forward(input, weight, bias, backend=ops.NATIVE):
        return kernel(ops.linear_relu_forward, input, weight, bias, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        input, weight, _, *backend = inputs
        ctx.backend = backend[0] if backend else ops.NATIVE
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        if not transforming() and not ctx.needs_input_grad[1]:
            input = shape_of(input)
        ctx.save_for_backward(input, weight, output[1])
        save_for_forward(ctx, input, weight, output[1])

    @staticmethod
    def backward(ctx, grad_out, _grad_mask):
        needs = ctx.needs_input_grad[:3]
        if grad_out is None:
            return (None,) * 4
        if may_be_differentiated():
            return (*linear_relu_gradients(grad_out, *ctx.saved_tensors, needs, ctx.backend), None)
        grads = kernel(
            ops.linear_relu_backward, grad_out, *ctx.saved_tensors, list(needs), ctx.backend
        )
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None)

    @staticmethod
    def jvp(ctx, t_input, t_weight, t_bias, _backend=None):
        tangent = linear_relu_tangent(*ctx.saved_tensors, t_input, t_weight, t_bias, ctx.backend)
        return tangent, None

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, backend=ops.NATIVE):
        return batched_linear_relu(
            LinearReLUFunction.apply, info.batch_size, in_dims[:3], input, weight, bias, backend
        )


class MLPFunction(torch.autograd.Function):
    """A stack Linear-ReLU-...-Linear by the kernels, as one autograd Function.

    Saves x, the weights and the hidden activations, from which the backward reads the ReLUs; no x
    where all weights are frozen. The second derivative and forward mode go layer by layer.

    Args of ``apply``, all by position:
        input: ``[*, N_0]``.
        layers: L, the number of layers, an int.
        parameters: L weights ``[N_l, N_{l-1}]``, then L biases ``[N_l]`` or None.

    Returns:
        The output ``[*, N_L]``, then the hidden activations of the L - 1 first layers.

    Raises:
        RuntimeError: a kernel refuses an argument.

    >>> import torch
    >>> from fastattn.functional import MLPFunction
    >>> weights = [torch.randn(6, 8), torch.randn(3, 6)]
    >>> out, hidden = MLPFunction.apply(torch.randn(4, 8), 2, *weights, None, None)
    >>> out.shape, hidden.shape
    (torch.Size([4, 3]), torch.Size([4, 6]))
    """

    @staticmethod
    def forward(input, layers, *parameters):
        return tuple(kernel(ops.mlp_forward, input, *_layers(input, layers, parameters)))

    @staticmethod
    def inference(input, layers, *parameters):
        return (kernel(ops.mlp_inference, input, *_layers(input, layers, parameters)),)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        input, ctx.layers, *parameters = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.frozen = not any(ctx.needs_input_grad[2 : 2 + ctx.layers])
        if ctx.frozen:
            input = shape_of(input)
        ctx.save_for_backward(input, *parameters, *output[1:])

    @staticmethod
    def backward(ctx, grad_out, *_grad_hidden):
        layers = ctx.layers
        if grad_out is None:
            return (None,) * (2 + 2 * layers)
        input, *rest = ctx.saved_tensors
        parameters, hidden = rest[: 2 * layers], rest[2 * layers :]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        if may_be_differentiated() or is_batched_gradient(grad_out):
            if ctx.frozen:
                grads = _gradients_of_frozen(grad_out, parameters[:layers], hidden, needs)
            else:

                def call(x: Any, *tensors: Any) -> list[Tensor]:
                    return [layer_by_layer(x, tensors[:layers], tensors[layers:], ops.NATIVE)]

                grads = gradients_again(call, (input, *parameters), [grad_out], needs)
        else:
            grads = kernel(ops.mlp_backward, grad_out, input, parameters[:layers], hidden, needs)
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (grads[0], None, *grads[1:])


def _gradients_of_frozen(
    grad_out: Tensor, weights: Sequence[Tensor], hidden: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The same where no weight needs a gradient, by torch's products: the gradients are then
    bilinear in grad_out and the weights."""
    layers = len(weights)
    grads: list[Tensor | None] = [None] * len(needs)
    with without_autocast(grad_out):
        for i in reversed(range(layers)):
            if needs[1 + layers + i]:
                grads[1 + layers + i] = grad_out.reshape(-1, grad_out.shape[-1]).sum(0)
            grad_out = grad_out @ weights[i]
            if i > 0:
                grad_out = torch.where(hidden[i - 1] <= 0, 0.0, grad_out)
    return [grad_out, *grads[1:]]


def layer_by_layer(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    backend: str,
) -> Tensor:
    """The MLP, with an autograd node for each layer."""
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        input = apply(LinearReLUFunction, input, weight, bias, backend)[0]
    return torch.nn.functional.linear(input, weights[-1], biases[-1])


def _layers(
    input: Tensor, layers: int, parameters: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases as the ops take them: an absent bias has shape ``[0]``."""
    weights: list[Any] = list(parameters[:layers])
    biases: list[Any] = list(parameters[layers:])
    if any(b is None for b in biases):
        absent = input.new_empty((0,))
        biases = [absent if b is None else b for b in biases]
    return weights, biases


def linear_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """relu(input weightᵀ + bias), ``[..., out_features]``, as one kernel.

    Args:
        input: ``[..., in_features]``, floating point.
        weight: ``[out_features, in_features]``, of input's dtype and device; under autocast the
            dtypes may differ, and all are cast.
        bias: ``[out_features]`` or None.
        backend: ``cpu``, ``cuda``, ``triton``, ``reference``, or None for the first that serves the
            call.

    Returns:
        ``[..., out_features]`` in input's dtype. A NaN stays a NaN.

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: ``backend`` names one that cannot serve the call.

    >>> import torch, fastattn
    >>> input, weight, bias = torch.randn(4, 8), torch.randn(3, 8), torch.randn(3)
    >>> out = fastattn.linear_relu(input, weight, bias)
    >>> torch.allclose(out, torch.relu(input @ weight.T + bias), atol=1e-5)
    True
    """
    _validate.tensor("input", input)
    input, weight, bias = autocast(input, weight, bias)
    chosen = backends.select_layers("linear_relu", input, (weight,), backend)
    if chosen == "cpu" and backends.torch_multiplies(input, backend):
        _validate.layers(input, [weight], [bias])
        return reference.linear_relu(input, weight, bias)
    if op_validates(chosen):
        try:
            return apply(LinearReLUFunction, input, weight, bias)[0]
        except (RuntimeError, TypeError):
            _validate.layers(input, [weight], [bias])
            raise
    _validate.layers(input, [weight], [bias])
    if chosen == "reference":
        return reference.linear_relu(input, weight, bias)
    return apply(LinearReLUFunction, input, weight, bias, backends.kernels_of(chosen))[0]


def op_validates(backend: str) -> bool:
    """Whether the C++ op validates. Python then validates only after a failure, for a message in
    the user's words: for a small layer the Python checks would take longer than the kernel."""
    return backend == "cpu" and not torch.compiler.is_compiling()
