"""The derivatives of relu(x Wᵀ + b), E16 and E17. With R fixed the gradients are bilinear in dY and
(x, W), the tangent in (x, W) and the tangents: two Functions, closed under differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from fastattn.functional._autograd import (
    add,
    apply,
    kernel,
    save_for_forward,
    without_autocast,
)


class LinearReLUBackward(torch.autograd.Function):
    """Those of (dX, dW, db) that ``needs`` names, E16. Saves its inputs."""

    @staticmethod
    def forward(needs, backend, grad_out, input, weight, mask):
        grads = kernel(
            ops.linear_relu_backward, grad_out, input, weight, mask, list(needs), backend
        )
        return tuple(g for g, need in zip(grads, needs, strict=True) if need)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.needs, ctx.backend, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        save_for_forward(ctx, *tensors)

    @staticmethod
    def backward(ctx, *grads):
        grad_out, input, weight, mask = ctx.saved_tensors
        given = iter(grads)
        a, b, c = (next(given) if need else None for need in ctx.needs)
        asked = ctx.needs_input_grad[2:]
        of_grad = of_input = of_weight = None
        if asked[0] and any(x is not None for x in (a, b, c)):
            of_grad = linear_relu_tangent(input, weight, mask, a, b, c, ctx.backend)
        # <a, G W> + <B, Gᵀ X>
        of_input = _gradient(0, asked[1], grad_out, input, b, mask, ctx.backend)
        of_weight = _gradient(1, asked[2], grad_out, a, weight, mask, ctx.backend)
        return None, None, of_grad, of_input, of_weight, None

    @staticmethod
    def jvp(ctx, _needs, _backend, t_grad_out, t_input, t_weight, _t_mask):
        grad_out, input, weight, mask = ctx.saved_tensors
        needs = ctx.needs
        total = [None] * 3
        if t_grad_out is not None:
            total = linear_relu_gradients(t_grad_out, input, weight, mask, needs, ctx.backend)
        moved = (
            _gradient(0, needs[0], grad_out, input, t_weight, mask, ctx.backend),
            _gradient(1, needs[1], grad_out, t_input, weight, mask, ctx.backend),
            None,
        )
        shapes = (input.shape, weight.shape, weight.shape[:1])
        sums = [add(x, y) for x, y in zip(total, moved, strict=True)]
        return tuple(
            input.new_zeros(shape) if x is None else x
            for x, shape, need in zip(sums, shapes, needs, strict=True)
            if need
        )

    @staticmethod
    def vmap(info, in_dims, needs, backend, grad_out, input, weight, mask):
        size, dims = info.batch_size, in_dims[2:]
        if dims[2] is None and tuple(needs) == (True, False, False):
            grad_out, input, mask = _in_front(size, (grad_out, input, mask), (*dims[:2], dims[3]))
            folded = mask.flatten(0, 1)
            return LinearReLUBackward.apply(needs, backend, grad_out, input, weight, folded), (0,)
        grad_out, input, weight, mask = _in_front(size, (grad_out, input, weight, mask), dims)
        shape, grad_out, input = input.shape, _rows(grad_out), _rows(input)
        masked = torch.where(_passes(mask, grad_out.shape[-1]), grad_out, 0.0)
        found = []
        with without_autocast(input):
            if needs[0]:
                found.append((masked @ weight).reshape(shape))
            if needs[1]:
                found.append(masked.transpose(1, 2) @ input)
            if needs[2]:
                found.append(masked.sum(1))
        return tuple(found), (0,) * len(found)


class LinearReLUTangent(torch.autograd.Function):
    """tY = R∘(tX Wᵀ + X tWᵀ + tb), E17. Saves its inputs."""

    @staticmethod
    def forward(backend, input, weight, mask, t_input, t_weight, t_bias):
        backend = "triton" if input.is_cuda else backend  # CUDA has no kernel for it
        return kernel(ops.linear_relu_jvp, input, weight, mask, t_input, t_weight, t_bias, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.backend, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        save_for_forward(ctx, *tensors)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 7
        input, weight, mask, t_input, t_weight, _ = ctx.saved_tensors
        asked = ctx.needs_input_grad[1:]
        needs = (asked[3], asked[4], asked[5])
        of_tangents = [None] * 3
        if any(needs):
            of_tangents = linear_relu_gradients(grad, input, weight, mask, needs, ctx.backend)
        of_input = _gradient(0, asked[0], grad, input, t_weight, mask, ctx.backend)
        of_weight = _gradient(1, asked[1], grad, t_input, weight, mask, ctx.backend)
        return None, of_input, of_weight, None, *of_tangents

    @staticmethod
    def jvp(ctx, _backend, u_input, u_weight, _mask, tt_input, tt_weight, tt_bias):
        input, weight, mask, t_input, t_weight, _ = ctx.saved_tensors
        total = None
        if any(x is not None for x in (tt_input, tt_weight, tt_bias)):
            total = linear_relu_tangent(
                input, weight, mask, tt_input, tt_weight, tt_bias, ctx.backend
            )
        for x, w in ((t_input, u_weight), (u_input, t_weight)):
            if x is not None and w is not None:  # R∘(x wᵀ)
                moved = linear_relu_tangent(x, w, mask, x, None, None, ctx.backend)
                total = add(total, moved)
        if total is None:
            total = input.new_zeros((*input.shape[:-1], weight.shape[0]))
        return total

    @staticmethod
    def vmap(info, in_dims, backend, input, weight, mask, t_input, t_weight, t_bias):
        size, dims = info.batch_size, in_dims[1:]
        tensors = (input, weight, mask, t_input, t_weight, t_bias)
        mapped = [x is not None and d is not None for x, d in zip(tensors, dims, strict=True)]
        if not (mapped[1] or mapped[4] or mapped[5]):
            at = (0, 2, 3)
            input, mask, t_input = _in_front(size, [tensors[n] for n in at], [dims[n] for n in at])
            tangent = LinearReLUTangent.apply(
                backend, input, weight, mask.flatten(0, 1), t_input, t_weight, t_bias
            )
            return tangent, 0
        input, weight, mask, t_input, t_weight, t_bias = _in_front(size, tensors, dims)
        shape, width = input.shape[:-1], weight.shape[1]
        total = None
        with without_autocast(input):
            if t_input is not None:
                total = _rows(t_input) @ weight.transpose(1, 2)
            if t_weight is not None:
                total = add(total, _rows(input) @ t_weight.transpose(1, 2))
        if t_bias is not None:
            total = t_bias[:, None] if total is None else total + t_bias[:, None]
        tangent = torch.where(_passes(mask, width), total, 0.0)
        return tangent.reshape(*shape, width), 0


def linear_relu_gradients(
    grad_out: Tensor | None,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor | None]:
    """Gradients of input, weight and bias, differentiable; None for one that is not needed."""
    if grad_out is None or not any(needs):
        return [None] * 3
    found = iter(apply(LinearReLUBackward, tuple(needs), backend, grad_out, input, weight, mask))
    return [next(found) if need else None for need in needs]


def linear_relu_tangent(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    t_input: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    backend: str,
) -> Tensor:
    """The output's tangent, differentiable."""
    return apply(LinearReLUTangent, backend, input, weight, mask, t_input, t_weight, t_bias)


def _gradient(
    which: int,
    asked: bool,
    grad_out: Tensor | None,
    input: Tensor | None,
    weight: Tensor | None,
    mask: Tensor,
    backend: str,
) -> Tensor | None:
    """G W (0) or Gᵀ X (1), G = dY∘R; None where it is not asked for or a factor is 0."""
    if not asked or grad_out is None or input is None or weight is None:
        return None
    needs = (which == 0, which == 1, False)
    return linear_relu_gradients(grad_out, input, weight, mask, needs, backend)[which]


# --- vmap -----------------------------------------------------------------------------------------


def batched_linear_relu(
    function: Callable[..., tuple[Tensor, Tensor]],
    size: int,
    in_dims: Sequence[int | None],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    backend: str,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Output and bit-mask of mapped inputs: the kernel where all share weight and bias; a product
    of torch's where each has its own."""
    if in_dims[1] is None and (bias is None or in_dims[2] is None):
        (input,) = _in_front(size, (input,), in_dims[:1])
        out, mask = function(input, weight, bias, backend)
        return (out, mask.unflatten(0, (size, mask.shape[0] // size))), (0, 0)
    input, weight, bias = _in_front(size, (input, weight, bias), in_dims)
    with without_autocast(input):
        sums = _rows(input) @ weight.transpose(1, 2)
    out = torch.relu(sums if bias is None else sums + bias[:, None])
    return (out.reshape(*input.shape[:-1], weight.shape[1]), _bits(out)), (0, 0)


def _in_front(
    size: int, tensors: Sequence[Tensor | None], in_dims: Sequence[int | None]
) -> list[Any]:
    """The tensors with the mapped dimension in front, repeated without a copy where it is not
    mapped."""
    return [
        None if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]


def _rows(x: Tensor) -> Tensor:
    """``[N, *, K]`` -> ``[N, M, K]``."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _bits(out: Tensor) -> Tensor:
    """R of outputs ``[N, M, F]`` as the kernels keep it, uint8 ``[N, M, ceil(F / 8)]``."""
    passes = torch.nn.functional.pad(~(out.detach() <= 0), (0, -out.shape[-1] % 8))
    places = torch.arange(8, device=out.device, dtype=torch.uint8)
    shifted = passes.unflatten(-1, (-1, 8)).to(torch.uint8) << places
    return shifted.sum(-1, dtype=torch.uint8)


def _passes(mask: Tensor, width: int) -> Tensor:
    """The inverse of ``_bits``: bool ``[N, M, width]``."""
    places = torch.arange(8, device=mask.device, dtype=torch.uint8)
    return ((mask[..., None] >> places) & 1).flatten(-2)[..., :width].bool()
