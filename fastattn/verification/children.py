"""Families in child processes: a kernel that crashes or hangs costs its own row of the table."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

from fastattn.verification.families import Outcome

MARK = "fastattn.verification: "  # begins a child's lines, beside which libraries may print
FAMILY_SECONDS = 300.0  # Triton compiles some ten kernels for a family


class Result(NamedTuple):
    """What came of a family, and how long it took."""

    family: str
    outcome: Outcome
    seconds: float


def command(backend: str, device: str, names: Sequence[str]) -> list[str]:
    """What checks the families one after the other."""
    return [sys.executable, "-m", "fastattn.verification", backend, device, *names]


def check(
    backend: str, device: str, names: Sequence[str], seconds: float = FAMILY_SECONDS
) -> Iterator[Result]:
    """Each family's result. A child checks the families one after the other; after one that
    raises, crashes or takes longer than ``seconds``, a new child goes on with the next."""
    waiting = list(names)
    while waiting:
        with tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(
                command(backend, device, waiting),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # a group of its own, which is killed as a whole
            )
            reports: queue.Queue[dict | None] = queue.Queue()
            threading.Thread(target=_read, args=(child.stdout, reports), daemon=True).start()
            try:
                while waiting:
                    result = _next(waiting[0], reports, child, errors, seconds)
                    waiting.pop(0)
                    yield result
                    if result.outcome.exception:
                        break
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _read(lines: IO[str], reports: queue.Queue[dict | None]) -> None:
    """Hands on a child's reports, and None at its end."""
    with lines:
        for line in lines:
            if line.startswith(MARK):
                reports.put(json.loads(line.removeprefix(MARK)))
    reports.put(None)


def _next(
    family: str,
    reports: queue.Queue[dict | None],
    child: subprocess.Popen,
    errors: IO[bytes],
    seconds: float,
) -> Result:
    try:
        report = reports.get(timeout=seconds)
    except queue.Empty:
        return Result(family, Outcome(exception=f"did not finish within {seconds:g} s"), seconds)
    if report is not None:
        return Result(family, Outcome(**report["outcome"]), report["seconds"])
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
    ended = f"the process ended with status {child.wait()}: {lines[-1]}"
    return Result(family, Outcome(exception=ended), 0.0)
