"""The one home of torch's private names that tell whether a kernel may stand in for torch's own
code.

In a torch that lacks one of them the answer is the one with which torch's code runs: drop-ins are
then slower, never wrong.
"""

from __future__ import annotations

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
