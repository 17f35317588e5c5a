"""The ops' own autograd, for whoever calls them without the Functions: graphs of torch.compile and
torch.export, and users of torch.ops. An op that is differentiated, in any mode, goes through its
Function; otherwise the kernel is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import ops
from fastattn.functional._autograd import in_transform, kernel
from fastattn.functional.attention import AttentionFunction
from fastattn.functional.attention_derivatives import AttentionDerivative, Call, Request, Results
from fastattn.functional.linear import LinearReLUFunction, MLPFunction
from fastattn.functional.linear_derivatives import LinearReLUBackward, LinearReLUTangent


def _options(args: Sequence[object], triton: bool) -> tuple[tuple, ops.Options]:
    """(seed, starts_q, starts_k, is_causal, scale, dropout_p) and the Options of an attention op's
    last arguments."""
    if triton:
        seed, starts_q, starts_k, max_q, max_k, *rest = args
    else:
        (seed, starts_q, starts_k, *rest), max_q, max_k = args, 0, 0
    is_causal, scale, dropout_p, left, right, softcap = rest
    options = ops.Options(left, right, softcap, max_q, max_k)
    return (seed, starts_q, starts_k, is_causal, scale, dropout_p), options


def _attention_forward(backend: str, *args):
    query, key, value, attn_mask, slopes, *rest = args
    (seed, starts_q, starts_k, *numbers), options = _options(rest, backend == "triton")
    return AttentionFunction.apply(
        query, key, value, attn_mask, seed, *numbers, slopes, starts_q, starts_k, options, backend
    )


def _derivative(
    backend: str,
    cotangents: tuple[Tensor | None, Tensor | None],
    inputs: tuple,
    tangents: tuple,
    results: Results,
    slopes: Tensor | None,
    rest: Sequence[object],
    needs: Sequence[bool],
) -> list[Tensor]:
    (seed, starts_q, starts_k, *numbers), options = _options(rest, backend == "triton")
    found = iter(
        AttentionDerivative.apply(
            Request(Call(*numbers, options, backend), tuple(needs)), *cotangents, *inputs,
            *results, seed, slopes, starts_q, starts_k, *tangents,
        )
    )  # fmt: skip
    likes = (*results[:2], *[inputs[0]] * 4)
    return [
        next(found) if need else like.new_empty((0,))
        for need, like in zip((needs[0], *needs), likes, strict=True)
    ]


def _attention_backward(backend: str, *args):
    go, gl, query, key, value, attn_mask, slopes, *rest, needs = args
    inputs, results, needs = (query, key, value, attn_mask), Results(*rest[:3]), (False, *needs)
    found = _derivative(backend, (go, gl), inputs, (), results, slopes, rest[3:], needs)
    return tuple(found[2:])


def _attention_jvp(backend: str, *args):
    query, key, value, attn_mask, slopes, *rest = args
    inputs, needs = (query, key, value, attn_mask), (True, False, False, False, False)
    results, tangents = Results(*rest[4:7]), tuple(rest[:4])
    found = _derivative(backend, (None, None), inputs, tangents, results, slopes, rest[7:], needs)
    return tuple(found[:2])


def _attention_double_backward(backend: str, *args):
    go, gl, query, key, value, attn_mask, slopes, *rest, needs = args
    inputs, tangents, results = (query, key, value, attn_mask), tuple(rest[:4]), Results(*rest[4:7])
    return tuple(_derivative(backend, (go, gl), inputs, tangents, results, slopes, rest[7:], needs))


def _linear_relu_forward(backend: str, input, weight, bias):
    return LinearReLUFunction.apply(input, weight, bias, backend)


def _linear_relu_backward(backend: str, grad_out, input, weight, mask, needs):
    found = iter(LinearReLUBackward.apply(tuple(needs), backend, grad_out, input, weight, mask))
    return tuple(next(found) if need else input.new_empty((0,)) for need in needs)


def _linear_relu_jvp(backend: str, *tensors):
    return LinearReLUTangent.apply(backend, *tensors)


def _mlp_forward(backend: str, input, weights, biases):
    biases = [None if b.numel() == 0 and w.shape[0] else b
              for w, b in zip(weights, biases, strict=True)]  # fmt: skip
    return list(MLPFunction.apply(input, len(weights), *weights, *biases))


def _mlp_inference(backend: str, *args):
    return _mlp_forward(backend, *args)[0]


class _MLPBackward(torch.autograd.Function):
    """The op, whose derivative is refused where it is asked for."""

    @staticmethod
    def forward(layers, needs, grad_out, input, *tensors):
        weights, hidden = list(tensors[:layers]), list(tensors[layers:])
        return tuple(kernel(ops.mlp_backward, grad_out, input, weights, hidden, needs))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "fastattn::mlp_backward has no derivative of its own: fastattn.mlp is differentiable "
            "any number of times"
        )


def _mlp_backward(backend: str, grad_out, input, weights, hidden, needs):
    tensors = (grad_out, input, *weights, *hidden)
    return list(_MLPBackward.apply(len(weights), needs, *tensors))


_FUNCTIONS = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "attention_jvp": _attention_jvp,
    "attention_double_backward": _attention_double_backward,
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
            on_gpu = next(x for x in args if isinstance(x, Tensor)).is_cuda
            try:
                return function("cuda" if on_gpu and backend == "cpu" else backend, *args)
            except NotImplementedError as error:
                # Of this kind torch.compile makes a break in the graph, and goes on without it.
                raise NotImplementedError(
                    f"{library.ns}::{name}: torch.func does not reach an op that is called "
                    "directly; call fastattn's functions or fastattn.functional's Functions"
                ) from error
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    library.impl(name, differentiable, "Autograd", with_keyset=True)


_libraries = []  # kept: a registration ends with its library
for _namespace, _backend in (("fastattn", "cpu"), ("fastattn_triton", "triton")):
    # Of a library that could not be loaded there are none.
    _present = [name for name in _FUNCTIONS if hasattr(getattr(torch.ops, _namespace), name)]
    if _present:
        _libraries.append(torch.library.Library(_namespace, "IMPL"))
    for _name in _present:
        _register(_libraries[-1], _name, _FUNCTIONS[_name], _backend)
