"""What a call needs of this process's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path


def peak_bytes(run: Callable[[], object]) -> int | None:
    """How far resident memory rises above what it was, in one run; None where /proc cannot say.
    Scratch memory that earlier runs left does not count again."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that its reuse shows
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (AttributeError, OSError, KeyError, ValueError):
        run()
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    values: dict[str, Sequence[str]] = {k: v.split() for k, v in (x.split(":", 1) for x in lines)}
    return int(values[field][0]) * 1024
