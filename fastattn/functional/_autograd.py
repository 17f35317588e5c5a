"""What the autograd Functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn._problem import autocast_dtype, follows_autocast


def apply(function: type[torch.autograd.Function], *args: object) -> Any:
    """``function.apply(*args)``, in less time.

    Outside of torch.func and torch.compile it skips ``apply``'s inspection of the signature, which
    takes longer than a small kernel. Where nothing can be differentiated it calls the Function's
    ``inference``, or ``forward`` if the Function has none.
    """
    if recording():
        return function.forward(*args)  # the op has its own autograd
    if in_transform():
        return function.apply(*args)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return getattr(function, "inference", function.forward)(*args)
    return _base_apply(function, *_unwrap_dead_wrappers(args))


def recording() -> bool:
    """Whether torch.compile or torch.jit.trace records the ops that are called. A Function in the
    record would be a call of Python, which cannot be saved."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def without_autocast(x: Tensor) -> torch.autocast:
    """A context for derivatives by torch's own operations: these keep their operands' dtype, as
    kernels do."""
    return torch.autocast(x.device.type, enabled=False)


R = TypeVar("R")

try:
    from torch._C import _are_functorch_transforms_active as _in_transform
    from torch._functorch.utils import unwrap_dead_wrappers as _unwrap_dead_wrappers

    _base_apply = torch._C._FunctionBase.__dict__["apply"]
except (ImportError, AttributeError, KeyError):  # not a public interface
    _base_apply = None


_is_legacy_batch: Callable[[Tensor], bool] | None
try:
    from torch._C._functorch import is_legacy_batchedtensor as _is_legacy_batch
except ImportError:  # not a public interface
    _is_legacy_batch = None


def kernel(op: Callable[..., R], *args: Any) -> R:
    """Calls an op in a Function's forward, below the op's own autograd."""
    if recording():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def autocast(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors, cast to autocast's dtype where autocast is on for the first one's device;
    float64 is left alone, as in torch.

    The cast comes before the checks, because code under autocast gives tensors of several dtypes:
    rotary embeddings give float32 queries and keys beside 16-bit values.
    """
    dtype = autocast_dtype(first.device.type)
    tensors = (first, *others)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t is not None and follows_autocast(t) else t for t in tensors)


def save_for_forward(ctx, *tensors: Tensor | None) -> None:
    """``ctx.save_for_forward`` only where forward mode may run: it holds strong references, and one
    to an output would keep the output's own graph alive."""
    if transforming():
        ctx.save_for_forward(*tensors)


class _Add(torch.autograd.Function):
    """a + b. Torch calls a Function's jvp with forward mode off, where a plain addition would
    lose the tangents of an outer jvp; a Function switches forward mode on again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return a + b

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad

    @staticmethod
    def jvp(ctx, t_a, t_b):
        return add(t_a, t_b)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b in a Function's derivatives; None is 0."""
    if a is None or b is None:
        return b if a is None else a
    return apply(_Add, a, b) if transforming() else a + b


def shape_of(x: Tensor) -> Tensor:
    """A stand-in of one element for a tensor whose values no derivative reads: the tensor itself
    may then be freed, or changed in place, as with torch's Linear."""
    return x.new_zeros(()).expand(x.shape)


def gradients_again(
    call: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Any],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the tensors that are needed, with a graph of their own: ``call`` computes
    the outputs once more, by operations that can be differentiated."""
    with torch.enable_grad(), without_autocast(tensors[0]):
        # An alias of each argument: a tensor that is given twice, or computed from another
        # argument, gets a gradient for each place. A stand-in has no graph of its own.
        aliases: list[Any] = [None if x is None else x.view_as(x) for x in tensors]
        for alias, need in zip(aliases, needs, strict=True):
            if need and not alias.requires_grad:
                alias.requires_grad_()
        outs = [(out, g) for out, g in zip(call(*aliases), grads, strict=True) if g is not None]
        wanted = [x for x, need in zip(aliases, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in outs], wanted, [g for _, g in outs],
                create_graph=True, allow_unused=True,
            )
        )  # fmt: skip
    return [next(found) if need else None for need in needs]


def may_be_differentiated() -> bool:
    """Whether what a backward computes is differentiated or mapped in turn."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or transforming()


def is_batched_gradient(grad: Tensor) -> bool:
    """Whether ``grad`` stands for a batch of gradients, in ``torch.autograd.grad`` with
    ``is_grads_batched=True``. That is no transform of torch.func, and needs ops that return
    tuples."""
    return _is_legacy_batch is not None and _is_legacy_batch(grad)


def in_transform() -> bool:
    """Whether one of torch.func's transforms may be on."""
    return _base_apply is None or _in_transform()


def transforming() -> bool:
    """Whether forward mode or one of torch.func's transforms may be on."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or in_transform()
