"""The ops' own autograd, for callers that do not go through the Functions: graphs of torch.compile
and torch.export, and users of torch.ops. An op that is differentiated, in any mode, goes through
its Function; any other call goes to the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import ops
from fastattn.functional._autograd import in_transform, kernel
from fastattn.functional.attention import AttentionFunction
from fastattn.functional.attention_derivatives import AttentionDerivative, Needs, Request
from fastattn.functional.layer_functions import (
    ActivationFunction,
    GatedLinearFunction,
    LinearFunction,
)
from fastattn.functional.linear_derivatives import LinearReLUBackward, LinearReLUTangent
from fastattn.functional.norm import DropoutAddNormFunction
from fastattn.functional.relu_layers import LinearReLUFunction, MLPFunction
from fastattn.ops import Call, Cotangents, Extras, Inputs, Options, Results, Tangents, split


def _attention_forward(backend: str, *args):
    inputs, extras, options = split(args, Inputs, Extras, Options)
    return AttentionFunction.apply(Call(options, backend), *inputs, *extras)


def _derivative(
    call: Call,
    cotangents: Cotangents,
    inputs: Inputs,
    extras: Extras,
    tangents: Sequence[Tangents],
    results: Results,
    needs: Needs,
) -> list[Tensor]:
    """J_n and G_n as the ops return them: what is not needed is empty."""
    flat = [x for t in tangents for x in t]
    found = iter(
        AttentionDerivative.apply(
            Request(call, needs), *cotangents, *inputs, *extras, *results, *flat
        )
    )
    likes = (results.out, results.row_max, *[inputs.query] * 4)
    return [
        next(found) if need else like.new_empty((0,))
        for need, like in zip(needs.each(), likes, strict=True)
    ]


def _attention_backward(backend: str, *args):
    cotangents, inputs, extras, results, options, needs = split(
        args, Cotangents, Inputs, Extras, Results, Options
    )
    call, needs = Call(options, backend), Needs(False, *needs)
    return tuple(_derivative(call, cotangents, inputs, extras, [], results, needs)[2:])


def _attention_jvp(backend: str, *args):
    inputs, extras, tangents, results, options = split(
        args, Inputs, Extras, Tangents, Results, Options
    )
    call, needs = Call(options, backend), Needs(results=True)
    return tuple(_derivative(call, Cotangents(), inputs, extras, [tangents], results, needs)[:2])


def _attention_double_backward(backend: str, *args):
    cotangents, inputs, extras, tangents, results, options, needs = split(
        args, Cotangents, Inputs, Extras, Tangents, Results, Options
    )
    call, needs = Call(options, backend), Needs(*needs)
    return tuple(_derivative(call, cotangents, inputs, extras, [tangents], results, needs))


def _activation_forward(backend: str, input, activation, dropout_p, seed):
    return ActivationFunction.apply(input, ops.ACTIVATIONS[activation], dropout_p, seed, backend)


def _activation_backward(backend: str, grad_out, input, activation, dropout_p, seed):
    def op(grad_out, input):
        name = ops.ACTIVATIONS[activation]
        return [ops.activation_backward(grad_out, input, name, dropout_p, seed, backend)]

    function = "fastattn.activation_dropout"
    return _Undifferentiable.apply("activation_backward", op, function, grad_out, input)[0]


def _linear_forward(
    backend: str, input, weights, biases, packed, activation, dropout_p, seed, save
):
    biases = _optional(weights, biases)
    options = (ops.ACTIVATIONS[activation], dropout_p, seed, save)
    return list(LinearFunction.apply(input, *options, len(weights), *weights, *biases))


def _gated_linear_forward(backend: str, *args):
    *tensors, activation, save = args
    return GatedLinearFunction.apply(*tensors, ops.ACTIVATIONS[activation], save)


def _linear_backward(backend: str, grads, input, weights, saved, dropout_p, needs):
    layers = len(weights)

    def op(input, *tensors):
        parts = [list(tensors[n * layers : (n + 1) * layers]) for n in range(3)]
        return ops.linear_backward(parts[0], input, parts[1], parts[2], dropout_p, needs)

    tensors = (input, *grads, *weights, *saved)
    return list(_Undifferentiable.apply("linear_backward", op, "fastattn.linear", *tensors))


def _linear_relu_forward(backend: str, input, weight, bias):
    return LinearReLUFunction.apply(input, weight, bias, backend)


def _linear_relu_backward(backend: str, grad_out, input, weight, mask, needs):
    found = iter(LinearReLUBackward.apply(tuple(needs), backend, grad_out, input, weight, mask))
    return tuple(next(found) if need else input.new_empty((0,)) for need in needs)


def _linear_relu_jvp(backend: str, *tensors):
    return LinearReLUTangent.apply(backend, *tensors)


def _optional(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor | None]:
    """None for a bias that is absent, of shape ``[0]``."""
    return [
        None if b.numel() == 0 and w.shape[0] else b for w, b in zip(weights, biases, strict=True)
    ]


def _mlp_forward(backend: str, input, weights, biases):
    biases = _optional(weights, biases)
    return list(MLPFunction.apply(input, len(weights), *weights, *biases))


def _mlp_inference(backend: str, *args):
    return _mlp_forward(backend, *args)[0]


def _dropout_add_norm_forward(backend: str, *args):
    return DropoutAddNormFunction.apply(*args, backend)


class _Undifferentiable(torch.autograd.Function):
    """A backward op whose own derivative only the user's function has; refuses to be
    differentiated."""

    @staticmethod
    def forward(op, backward, function, *tensors):
        return tuple(kernel(backward, *tensors))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.op, _, ctx.function, *_ = inputs

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"fastattn::{ctx.op} has no derivative of its own: {ctx.function} is differentiable "
            "any number of times"
        )


def _dropout_add_norm_backward(backend: str, *args):
    op = ops.dropout_add_norm_backward
    name, function = "dropout_add_norm_backward", "fastattn.dropout_add_norm"
    return tuple(_Undifferentiable.apply(name, op, function, *args, backend))


def _mlp_backward(backend: str, grad_out, input, weights, hidden, needs):
    layers = len(weights)

    def op(grad_out, input, *tensors):
        return ops.mlp_backward(grad_out, input, [*tensors[:layers]], [*tensors[layers:]], needs)

    tensors = (grad_out, input, *weights, *hidden)
    return list(_Undifferentiable.apply("mlp_backward", op, "fastattn.mlp", *tensors))


_FUNCTIONS = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "attention_jvp": _attention_jvp,
    "attention_double_backward": _attention_double_backward,
    "dropout_add_norm_forward": _dropout_add_norm_forward,
    "dropout_add_norm_backward": _dropout_add_norm_backward,
    "activation_forward": _activation_forward,
    "activation_backward": _activation_backward,
    "linear_forward": _linear_forward,
    "gated_linear_forward": _gated_linear_forward,
    "linear_backward": _linear_backward,
    "linear_relu_forward": _linear_relu_forward,
    "linear_relu_backward": _linear_relu_backward,
    "linear_relu_jvp": _linear_relu_jvp,
    "mlp_forward": _mlp_forward,
    "mlp_inference": _mlp_inference,
    "mlp_backward": _mlp_backward,
}


def _differentiated(args: Sequence[object]) -> bool:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return True
    return torch._C._is_fwd_grad_enabled() and (forward_ad._current_level >= 0 or in_transform())


def _register(
    library: torch.library.Library, name: str, function: Callable[..., object], backend: str
) -> None:
    op = getattr(getattr(torch.ops, library.ns), name).default

    def differentiable(keyset, *args):
        if _differentiated(args):
            try:
                return function(backend, *args)
            except NotImplementedError as error:
                # torch.compile turns a NotImplementedError into a graph break.
                raise NotImplementedError(
                    f"{library.ns}::{name}: torch.func does not reach an op that is called "
                    "directly; call fastattn's functions or fastattn.functional's Functions"
                ) from error
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    library.impl(name, differentiable, "Autograd", with_keyset=True)


_libraries = []  # a registration ends with its library
for _namespace, _backend in (("fastattn", ops.NATIVE), ("fastattn_triton", "triton")):
    _libraries.append(torch.library.Library(_namespace, "IMPL"))
    for _name, _function in _FUNCTIONS.items():
        if hasattr(getattr(torch.ops, _namespace), _name):
            _register(_libraries[-1], _name, _function, _backend)
