"""What the autograd Functions share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on for their device; float64 is left
    alone, as in torch."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


class _FirstOrderOnly(torch.autograd.Function):
    """Runs a backward kernel under create_graph=True; differentiating its result raises instead of
    being dropped."""

    @staticmethod
    def forward(kernel: Callable[..., tuple[Tensor, ...]], name: str, *inputs: Tensor | None):
        return tuple(kernel(*inputs))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"fastattn: the second derivative of {ctx.name} is not available from the kernels yet; "
            'pass backend="reference" for one that is differentiable any number of times'
        )


def first_order(
    kernel: Callable[..., tuple[Tensor, ...]], name: str, *inputs: Tensor | None
) -> tuple[Tensor, ...]:
    """kernel(*inputs), inside a backward: a second differentiation of the result raises a clear
    error."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _FirstOrderOnly.apply(kernel, name, *inputs)
    return tuple(kernel(*inputs))
