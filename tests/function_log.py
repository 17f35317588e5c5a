"""What a torch function mode sees."""

from __future__ import annotations

from torch.overrides import TorchFunctionMode


class FunctionLog(TorchFunctionMode):
    """The functions that are called, reading a tensor's attributes included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))
