"""The benchmark's results as text: tables for the terminal, a CSV file."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fastattn.cli.bench.measure import Result

COLUMNS = ("case", "dtype", "direction", "peer", "peer / ours", "quartiles", "GFLOP/s",
            "% of roofline", "peer's %", "peak MB", "peer's MB")  # fmt: skip
_TEXT = 4  # columns of text, then numbers


def cells(result: Result) -> tuple[str, ...]:
    _, name, dtype, direction = result.case.key
    if result.error:
        return (
            name,
            dtype,
            direction,
            f"{result.peer}: error" if result.peer else "wrong result",
            result.error,
            *[""] * 6,
        )

    def megabytes(n: int | None) -> str:
        return "" if n is None else f"{n / 1e6:.1f}"

    return (
        name, dtype, direction, result.peer, f"{result.ratio:.2f}",
        f"{result.low:.2f}-{result.high:.2f}", f"{result.gflops:.1f}", f"{result.percent:.0f}",
        f"{result.peer_percent:.0f}", megabytes(result.memory), megabytes(result.peer_memory),
    )  # fmt: skip


def table(title: str, results: Sequence[Result]) -> Table:
    found = Table(title=title)
    for i, column in enumerate(COLUMNS):
        found.add_column(column, justify="left" if i < _TEXT else "right")
    for result in results:
        found.add_row(*cells(result))
    return found


def geometric_means(results: Sequence[Result]) -> list[tuple[str, str, str, float, float]]:
    """(op, dtype and direction and which of our implementations, peer, geometric mean of the
    ratios, the lowest of them)."""
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for r in results:
        if not r.error:
            op, _, dtype, direction = r.case.key
            kind = f"{dtype} {direction} {r.case.variant}".strip()
            groups[op, kind, r.peer].append(r.ratio)
    return [
        (*key, math.exp(math.fsum(map(math.log, ratios)) / len(ratios)), min(ratios))
        for key, ratios in groups.items()
    ]


def means_table(results: Sequence[Result]) -> Table:
    found = Table(title="geometric means")
    for column in ("op", "kind", "peer", "peer / ours", "lowest"):
        found.add_column(column)
    for op, kind, peer, mean, lowest in geometric_means(results):
        found.add_row(op, kind, peer, f"{mean:.2f}", f"{lowest:.2f}")
    return found


def write_csv(path: Path, results: Sequence[Result]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(results[0].row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(r.row for r in results)


def read_csv(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows of an earlier CSV by (op, case, dtype, direction, peer).

    Raises ValueError if it is not a CSV file of this command.
    """
    keys = ("op", "case", "dtype", "direction", "peer")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = {*keys, "ratio", "percent_of_roofline"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: expected a CSV file of fastattn bench, got one without "
                             f"{', '.join(sorted(missing))}")  # fmt: skip
        return {tuple(row[k] for k in keys): row for row in reader}


def comparison(old: dict[tuple[str, ...], dict[str, str]], results: Sequence[Result]) -> Table:
    """Then and now. Machines and neighbours differ: the share of the roofline is what compares."""
    found = Table(title="against the earlier run")
    for column in ("case", "kind", "peer", "% of roofline", "peer / ours", "change"):
        found.add_column(column)
    for r in results:
        row = old.get((*r.case.key, r.peer))
        if r.error or row is None or row.get("error"):
            continue
        before = float(row["percent_of_roofline"])
        change = r.percent / before if before else math.nan
        color = "red" if change < 0.9 else "green" if change > 1.1 else ""
        text = f"{100 * (change - 1):+.0f} %"
        found.add_row(
            r.case.name, f"{str(r.case.dtype)[6:]} {r.case.direction}", r.peer,
            f"{before:.0f} -> {r.percent:.0f}", f"{float(row['ratio']):.2f} -> {r.ratio:.2f}",
            f"[{color}]{text}[/]" if color else text,
        )  # fmt: skip
    return found
