"""The benchmark's results: a terminal table, a CSV file, one HTML page that needs nothing else."""

from __future__ import annotations

import csv
import html
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fastattn.cli.bench.measure import Result

_COLUMNS = ("case", "dtype", "direction", "peer", "peer / ours", "quartiles", "GFLOP/s",
            "% of roofline", "peer's %", "peak MB", "peer's MB")  # fmt: skip
_TEXT = 4  # columns of text, then numbers


def cells(result: Result) -> tuple[str, ...]:
    _, name, dtype, direction = result.case.key
    if result.error:
        return (name, dtype, direction, "wrong result", result.error, *[""] * 6)

    def megabytes(n: int | None) -> str:
        return "" if n is None else f"{n / 1e6:.1f}"

    return (
        name, dtype, direction, result.peer, f"{result.ratio:.2f}",
        f"{result.low:.2f}-{result.high:.2f}", f"{result.gflops:.1f}", f"{result.percent:.0f}",
        f"{result.peer_percent:.0f}", megabytes(result.memory), megabytes(result.peer_memory),
    )  # fmt: skip


def table(title: str, results: Sequence[Result]) -> Table:
    found = Table(title=title)
    for i, column in enumerate(_COLUMNS):
        found.add_column(column, justify="left" if i < _TEXT else "right")
    for result in results:
        found.add_row(*cells(result))
    return found


def geometric_means(results: Sequence[Result]) -> list[tuple[str, str, str, float, float]]:
    """(op, dtype and direction, peer, geometric mean of the ratios, the lowest of them)."""
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for r in results:
        if not r.error:
            op, _, dtype, direction = r.case.key
            groups[op, f"{dtype} {direction}", r.peer].append(r.ratio)
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


# --- the page -------------------------------------------------------------------------------------


def write_html(path: Path, title: str, results: Sequence[Result]) -> None:
    """Needs matplotlib, which the extra ``bench`` brings."""
    from fastattn.cli.page import page

    plots = [_ratios(results), _roofline(results), _over_length(results), _memory(results)]
    head = "".join(f"<th>{html.escape(c)}</th>" for c in _COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(r)) + "</tr>" for r in results
    )
    means = "".join(
        f"<tr><td>{op}</td><td>{kind}</td><td>{peer}</td><td>{mean:.2f}</td>"
        f"<td>{lowest:.2f}</td></tr>"
        for op, kind, peer, mean, lowest in geometric_means(results)
    )
    body = (
        f"<h1>fastattn bench</h1><p>{html.escape(title)}</p>{''.join(filter(None, plots))}"
        "<table><tr><th>op</th><th>kind</th><th>peer</th><th>peer / ours, geometric mean</th>"
        f"<th>lowest</th></tr>{means}</table><table><tr>{head}</tr>{rows}</table>"
    )
    path.write_text(page("fastattn bench", body))


def _label(r: Result) -> str:
    dtype = str(r.case.dtype)[6:]
    return f"{r.case.name} {'' if dtype == 'float32' else dtype} {r.case.direction}"


def _bars(results: Sequence[Result], description: str, value, line: float) -> str:
    from fastattn.cli.page import figure_html, plt

    good = [r for r in results if not r.error]
    if not good:
        return ""
    figure, ax = plt.subplots(figsize=(9, 0.22 * len(good) + 1))
    ax.barh([f"{_label(r)}, {r.peer}" for r in good], [value(r) for r in good], height=0.6)
    ax.axvline(line, color="black", linewidth=1)
    ax.invert_yaxis()
    ax.tick_params(labelsize=7)
    ax.set_xlabel(description)
    return figure_html(figure, description)


def _ratios(results: Sequence[Result]) -> str:
    return _bars(results, "speed relative to the peer (1: the same)", lambda r: r.ratio, 1.0)


def _roofline(results: Sequence[Result]) -> str:
    first = {r.case.key: r for r in reversed(results)}
    rows = list(reversed(first.values()))
    return _bars(rows, "% of the measured roofline", lambda r: r.percent, 100.0)


def _over_length(results: Sequence[Result]) -> str:
    """Speed over the sequence length, where the same layer came in several."""
    from fastattn.cli.page import figure_html, plt

    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for r in results:
        if r.case.op == "attention" and not r.error and r.peer == "sdpa":
            kind = f"{r.case.name.split()[-1]} D={r.case.name.split()[-2].split('x')[-1]}"
            name = f"{str(r.case.dtype)[6:]} {r.case.direction} {kind}"
            if r.case.name.startswith("grid"):
                lines[name].append((r.case.seq, r.ratio))
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    if not lines:
        return ""
    figure, ax = plt.subplots(figsize=(9, 5))
    for name, points in lines.items():
        style = "--" if "backward" in name else "-"
        x, y = zip(*points, strict=True)
        ax.plot(x, y, style, marker="o", markersize=3, linewidth=1, label=name)
    ax.axhline(1.0, color="black", linewidth=1)
    ax.set(xscale="log", xlabel="sequence length", ylabel="SDPA's time over ours")
    lengths = sorted({seq for points in lines.values() for seq, _ in points})
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.set_xticks([], minor=True)
    ax.legend(fontsize=6, ncol=2)
    return figure_html(figure, "Speed relative to SDPA over the sequence length")


def _memory(results: Sequence[Result]) -> str:
    from fastattn.cli.page import figure_html, plt

    sizes = [
        (r, r.memory, r.peer_memory)
        for r in results
        if not r.error and r.memory is not None and r.peer_memory
    ]
    known = [each for each in sizes if max(each[1:]) > 1e6]
    if not known:
        return ""
    figure, ax = plt.subplots(figsize=(9, 0.3 * len(known) + 1))
    y = range(len(known))
    ax.barh(
        [i - 0.2 for i in y], [ours / 1e6 for _, ours, _ in known], height=0.35, label="fastattn"
    )
    ax.barh([i + 0.2 for i in y], [peers / 1e6 for _, _, peers in known], height=0.35, label="peer")
    ax.set_yticks(list(y), [f"{_label(r)}, {r.peer}" for r, *_ in known], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("peak resident memory of the first run beyond what was there, MB")
    ax.legend(fontsize=7)
    return figure_html(figure, "Peak memory")
