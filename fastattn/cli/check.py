"""``fastattn doctor --check``: every kernel of every backend against the reference, on this
machine."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

from fastattn import backends
from fastattn.verification import children, families, first_use
from fastattn.verification.children import Result
from fastattn.verification.problems import Device


def check(console: Console, backend: str | None = None) -> int:
    """Prints a row for each family of kernels of ``backend``, or of all; 1 where one failed.
    A backend that this machine lacks is no failure."""
    table = Table(title="Kernels against the float64 reference", title_justify="left")
    for column in ("backend", "family", "result"):
        table.add_column(column, overflow="fold")
    table.add_column("time", justify="right")
    failed = 0
    for name in backends.KERNELS if backend is None else (backend,):
        why = backends.unavailable(name)
        if why is not None:
            table.add_row(name, "all", f"[yellow]not available[/]: {why}", "")
            continue
        wrong = 0
        with console.status(f"{name} ..."):
            for result in _results(name):
                good = result.outcome.good
                text = "[green]ok[/]" if good else f"[red]FAILED[/]: {result.outcome}"
                table.add_row(name, result.family, text, f"{result.seconds:.1f} s")
                wrong += not good
        failed += wrong
        if not wrong and name != "cpu":
            first_use.forget(name)
    console.print(table)
    if failed:
        console.print(f"{failed} failed. Please send this output to the project's issue tracker.")
    return 1 if failed else 0


def _results(name: str) -> Iterator[Result]:
    """The CPU's kernels in this process; a GPU's, and Triton's interpreter, in others."""
    of = families.families_of(name)
    if name != "cpu":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield from children.check(name, device, of)
        return
    at = Device(name, torch.device("cpu"))
    for family in of:
        started = time.perf_counter()
        outcome = families.check(family, at, families.cases(name, at.device))
        yield Result(family, outcome, time.perf_counter() - started)
