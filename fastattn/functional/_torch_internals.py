"""The one home of torch's private names that tell whether a kernel may stand in for torch's own
code.

In a torch that lacks one of them the answer is the one with which torch's code runs: drop-ins are
then slower, never wrong.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

LACKING: list[str] = []  # what this torch lacks


def _from(home: object, name: str, instead: Any) -> Any:
    found = getattr(home, name, None)
    if found is None:
        LACKING.append(name)
        return instead
    return found


class _Unknown:
    """Stands for a class that this torch lacks: nothing is an instance of it."""


tracing_state = _from(torch._C, "_get_tracing_state", lambda: True)
_dispatch_modes = _from(torch._C, "_len_torch_dispatch_stack", lambda: 1)
function_modes = _from(torch._C, "_len_torch_function_stack", lambda: -1)
_function_mode = _from(torch._C, "_get_function_stack_at", lambda i: None)
_DeviceContext = _from(getattr(torch.utils, "_device", None), "DeviceContext", _Unknown)
FakeTensor = _from(getattr(torch, "_subclasses", None), "FakeTensor", _Unknown)
_saved_hooks = _from(
    getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", lambda _: True
)
_optimizers = sys.modules.get("torch.optim.optimizer")  # torch.optim deletes the name
_before_any_step = _from(_optimizers, "_global_optimizer_pre_hooks", {0: None})
_after_any_step = _from(_optimizers, "_global_optimizer_post_hooks", {0: None})
any_global_hook = _from(nn.modules.module, "_has_any_global_hook", lambda: True)


def watched() -> bool:
    """Whether somebody may watch or record torch's operations: ``torch.jit.trace``, a dispatch
    mode, a torch function mode but the one that sets the default device."""
    if tracing_state() is not None or _dispatch_modes():
        return True
    count = function_modes()
    return count < 0 or any(type(_function_mode(i)) is not _DeviceContext for i in range(count))


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs more than its class's forward."""
    try:
        return bool(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
            or module._compiled_call_impl is not None
        )
    except AttributeError:  # one of the private names is gone
        return True


def packs_saved_tensors() -> bool:
    """Whether ``torch.autograd.graph.saved_tensors_hooks`` are on."""
    return bool(_saved_hooks(False))


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of ``optimizer`` runs more than its class's step."""
    try:
        return bool(
            _before_any_step
            or _after_any_step
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or vars(optimizer).get("grad_scale") is not None  # a GradScaler's
            or vars(optimizer).get("found_inf") is not None
        )
    except AttributeError:  # one of the private names is gone
        return True


def step_beneath_schedulers(optimizer: torch.optim.Optimizer) -> Any:
    """The function that ``optimizer.step`` runs: beneath it where a learning rate scheduler has put
    its own before it, which notes the call and calls it."""
    own = vars(optimizer).get("step")
    if own is None:
        return type(optimizer).step
    known = getattr(own, "_wrapped_by_lr_sched", False)
    return getattr(own, "__wrapped__", None) if known else own


def note_step(optimizer: torch.optim.Optimizer) -> None:
    """What that function of a scheduler's notes."""
    if "step" in vars(optimizer):
        optimizer._opt_called = True  # type: ignore[attr-defined]
