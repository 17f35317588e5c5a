"""Programs in process groups of their own, each under its own clock.

A GPU kernel can hang, and can take its process with it. So each runs in a program that can be
killed, and its lines are read as they come: what it delivered before stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

CUT_OFF = "cut off"  # begins the status of a program that ran into its stage's end


def fact_of(line: str) -> dict | None:
    """The fact that a line tells; None for a line of a log."""
    if not line.startswith("@{"):
        return None
    try:
        return json.loads(line[1:])
    except ValueError:
        return None


class Child:
    """A running program. ``status`` is "" while it runs, then "ok" or what ended it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        seconds: float,
    ) -> None:
        self.name, self.seconds, self.status = name, seconds, ""
        self.lines: list[str] = []
        self._queue: queue.Queue[str] = queue.Queue()
        self.restart_clock()
        self._process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def restart_clock(self) -> None:
        self.ends = time.monotonic() + self.seconds

    def say(self, line: str) -> None:
        """Writes a line to the program; nothing happens if it has ended."""
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def poll(self) -> list[str]:
        """The lines since the last call. Kills the program when its clock has run out."""
        if self.status == "" and time.monotonic() > self.ends:
            self.kill(f"no end after {self.seconds:.0f} s")
        ended = self._process.poll() is not None
        if ended:
            self._reader.join(2.0)  # a grandchild may hold the pipe: its lines are not waited for
        fresh = []
        with contextlib.suppress(queue.Empty):
            while True:
                fresh.append(self._queue.get_nowait())
        self.lines += fresh
        if ended and self.status == "":
            self.status = _ended(self._process.returncode)
        return fresh

    def kill(self, why: str) -> None:
        """Ends the program and everything that it started."""
        if self.status == "":
            self.status = why
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)  # a process inside the driver may not end

    @property
    def log(self) -> list[str]:
        """The lines that tell no fact."""
        return [line for line in self.lines if line.strip() and fact_of(line) is None]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._queue.put(line.rstrip("\n"))


def watch(
    children: Iterable[Child],
    stop: float,
    on_line: Callable[[Child, str], None],
    until: Callable[[], bool] = lambda: False,
    kill: bool = True,
) -> None:
    """Reads the children until all have ended, ``until`` holds or the clock says ``stop``; those
    that still run at ``stop`` are killed, unless ``kill`` is False."""
    children = list(children)
    while True:
        running = False
        for child in children:
            had_ended = child.status != ""
            for line in child.poll():
                on_line(child, line)
            running |= child.status == ""
            if not had_ended and child.status != "":
                child.kill(child.status)  # what it started goes with it
        late = time.monotonic() > stop
        if not running or until() or (late and not kill):
            return
        if late:
            for child in children:
                if child.status == "":
                    child.kill(f"{CUT_OFF}: the stage's time was used up")
            stop = float("inf")  # the next round reads what they left
        time.sleep(0.02)


def _ended(returncode: int) -> str:
    if returncode == 0:
        return "ok"
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-returncode).name}"
    return f"exit status {returncode}"
