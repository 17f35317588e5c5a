"""What stands against the kernel in a step of training."""

from __future__ import annotations


class NotServed(Exception):
    """A reason, in words, why torch's own loop runs. ``lasting``: it lies in the model's code,
    which seldom changes."""

    def __init__(self, reason: str, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting
