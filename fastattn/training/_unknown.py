"""What stands against the kernel in a step of training."""

from __future__ import annotations


class NotServed(Exception):
    """A reason, in words, why torch's own loop runs."""
