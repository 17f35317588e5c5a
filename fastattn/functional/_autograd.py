"""What the autograd Functions share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def apply(function: type[torch.autograd.Function], *args: object) -> Tensor | tuple[Tensor, ...]:
    """``function.apply(*args)``. Outside of torch.func and torch.compile without ``apply``'s own
    inspection of the signature, which takes longer than a small kernel; where nothing can be
    differentiated, the Function's ``inference``, if it has one."""
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(args))
    if _base_apply is None or _in_transform():
        return function.apply(*args)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return getattr(function, "inference", function.forward)(*args)
    return _base_apply(function, *_unwrap_dead_wrappers(args))


def _distinct(args: tuple[object, ...]) -> list[object]:
    """A tensor that comes again (q, q, q) as a view of itself: torch.compile refuses a Function
    that is given the same tensor twice."""
    distinct: list[object] = []
    for arg in args:
        again = isinstance(arg, Tensor) and any(arg is earlier for earlier in distinct)
        distinct.append(arg.view_as(arg) if again else arg)
    return distinct


try:
    from torch._C import _are_functorch_transforms_active as _in_transform
    from torch._functorch.utils import unwrap_dead_wrappers as _unwrap_dead_wrappers

    _base_apply = torch._C._FunctionBase.__dict__["apply"]
except (ImportError, AttributeError, KeyError):  # not a public interface
    _base_apply = None


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on for the device of the first; float64 is
    left alone, as in torch."""
    device = tensors[0].device.type
    # Asking whether it exists costs more than the rest for the two that have it.
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):
        return tensors
    if not torch.is_autocast_enabled(device):
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
        return apply(_FirstOrderOnly, kernel, name, *inputs)
    return tuple(kernel(*inputs))
