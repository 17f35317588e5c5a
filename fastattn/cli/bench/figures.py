"""The benchmark's page: a figure for each question, then the tables.

Times of a peer over ours, and costs beside our own forward and backward, never share a figure.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastattn.cli.bench.case import OURS
from fastattn.cli.bench.charts import (
    Value,
    amount_bars,
    plt,
    points,
    ratio_bars,
    ratio_lines,
)
from fastattn.cli.bench.measure import Result
from fastattn.cli.bench.report import COLUMNS, cells, geometric_means
from fastattn.cli.page import figure_html, page

_RATIO = "times faster: the peer's time over fastattn's"
_HOW_RATIO = (
    "Bars to the right of the line, 1, are faster than the peer, bars to the left slower: medians "
    "of paired rounds. The scale is logarithmic."
)
_LAYERS = {
    "attention": "an attention layer",
    "linear": "a linear layer",
    "linear_relu": "a linear layer with ReLU",
    "mlp": "an MLP",
    "dropout_add_norm": "dropout, residual and norm",
    "encoder": "an encoder",
}
_WORTH_A_BAR = 1e6  # bytes
_HOW_MEMORY = (
    "How far the resident memory rises above what was there before the call, in MB. Calls that "
    f"take less than {_WORTH_A_BAR / 1e6:.0f} MB are left out."
)
_GRID = "grid"  # what the names of attention's cases over all lengths begin with


class Figure(NamedTuple):
    question: str
    how: str  # how it is read
    draw: Callable[[], plt.Figure]


def write_html(path: Path, title: str, results: Sequence[Result]) -> None:
    """Needs matplotlib, which the extra ``bench`` brings."""
    body = (
        f"<h1>fastattn bench</h1><p>{html.escape(title)}</p>"
        f"{''.join(map(_section, figures(results)))}{_means(results)}{_details(results)}"
    )
    path.write_text(page("fastattn bench", body))


def figures(results: Sequence[Result]) -> Iterator[Figure]:
    """Those that there are results for."""
    good = [r for r in results if not r.error]
    peers = [r for r in good if not r.to_ourselves]
    yield from _of_models([r for r in peers if r.case.op == "models"])
    for op, layer in _LAYERS.items():
        found = [r for r in peers if r.case.op == op and not r.case.name.startswith(_GRID)]
        if found:
            yield Figure(
                f"How many times faster is {layer}?", _HOW_RATIO, _ratios(found, _direction)
            )
    yield from _over_length(peers)
    yield from _second_order(good)
    yield from _roofline(good)
    yield from _memory(good)


def _ratios(results: Sequence[Result], series: Callable[[Result], str]) -> Callable[[], plt.Figure]:
    values = [Value(f"against {r.peer}", _row(r), series(r), r.ratio) for r in results]
    return lambda: ratio_bars(values, _RATIO)


def _row(r: Result) -> str:
    dtype = str(r.case.dtype)[6:]
    return r.case.name if dtype == "float32" else f"{r.case.name}, {dtype}"


def _direction(r: Result) -> str:
    return r.case.direction


def _of_models(results: Sequence[Result]) -> Iterator[Figure]:
    for direction, what in (("step", "a training step"), ("forward", "inference")):
        found = [r for r in results if r.case.direction == direction]
        if found:
            yield Figure(
                f"How many times faster is {what}?",
                f"{_HOW_RATIO} Each panel has another peer.",
                _ratios(found, lambda r: f"{OURS} {r.case.variant}"),
            )


def _over_length(results: Sequence[Result]) -> Iterator[Figure]:
    """Of the grid: a case's name is "grid 4x12x128x32 causal"."""
    values = []
    for r in results:
        if r.case.name.startswith(_GRID) and r.peer == "sdpa":
            _, shape, kind = r.case.name.split()
            panel = f"{str(r.case.dtype)[6:]}, {r.case.direction}"
            values.append(
                Value(panel, str(r.case.seq), f"D = {shape.split('x')[-1]} {kind}", r.ratio)
            )
    if values:
        yield Figure(
            "How many times faster than SDPA is attention, from short to long sequences?",
            "Above the line, 1, is faster. A color has a head dim; dashed lines are causal. The "
            "highest and the lowest number of each length are written.",
            lambda: ratio_lines(values, (" causal", " full"), "sequence length", "times faster"),
        )


def _second_order(results: Sequence[Result]) -> Iterator[Figure]:
    found = [r for r in results if r.case.op == "second_order"]
    peers = [r for r in found if not r.to_ourselves]
    if peers:
        yield Figure(
            "How many times faster are forward mode and the second derivative?",
            f"{_HOW_RATIO} jvp: torch.func.jvp of attention; double backward: the gradient of its "
            "gradients.",
            _ratios(peers, _direction),
        )
    costs = [
        Value(f"over {r.peer}", _row(r), _direction(r), 1 / r.ratio)
        for r in found
        if r.to_ourselves
    ]
    if costs:
        yield Figure(
            "What do forward mode and the second derivative cost beside our own forward and "
            "backward?",
            "How many times the time of fastattn's own forward or backward the kernel takes. Five "
            "products against two, twelve against five: 2.5 and 2.4 are to be expected.",
            lambda: amount_bars(costs, "times the time of our own kernel"),
        )


def _roofline(results: Sequence[Result]) -> Iterator[Figure]:
    values = [
        Value(
            "",
            f"{f'{r.case.op} {r.case.variant}'.strip()}, {str(r.case.dtype)[6:]}",
            r.case.direction,
            r.percent,
        )
        for r in _once(results)
    ]
    if values:
        yield Figure(
            "Which share of the machine's peak do the kernels reach?",
            "A point for each case: the least time that its arithmetic and its traffic allow on "
            "this machine, as measured in the same run, over fastattn's time. The line is 100 %; "
            "operands that stay in a cache can exceed it.",
            lambda: points(values, "% of the measured roofline", 100.0),
        )


def _once(results: Iterable[Result]) -> list[Result]:
    """One result for each of our implementations of a case, whichever the peer."""
    return list({r.case.key: r for r in results}.values())


def _memory(results: Sequence[Result]) -> Iterator[Figure]:
    def of(ops: Sequence[str], *directions: str) -> Iterator[Value]:
        for r in results:
            if r.case.op in ops and (r.case.direction in directions or not directions):
                yield from _memories(r)

    for question, values in (
        ("What memory does a training step take?", of(["models"], "step")),
        ("What memory does inference take?", of(["models"], "forward")),
        ("What memory does attention take?", of(["attention"])),
        ("What memory does another layer take?", of([*_LAYERS][1:])),
        ("What memory do forward mode and the second derivative take?", of(["second_order"])),
    ):
        found = _large(list(dict.fromkeys(values)))
        if found:
            yield Figure(question, _HOW_MEMORY, functools.partial(amount_bars, found, "megabytes"))


def _memories(r: Result) -> Iterator[Value]:
    if r.to_ourselves or r.case.name.startswith(_GRID):
        return
    panel = "" if r.case.op == "models" else r.case.direction
    sides = ((f"{OURS} {r.case.variant}".strip(), r.memory), (r.peer, r.peer_memory))
    for series, size in sides:
        if size is not None:
            yield Value(panel, _row(r), series, size / 1e6)


def _large(values: Sequence[Value]) -> list[Value]:
    """The rows of which a number is worth a bar."""
    rows = {(v.panel, v.row) for v in values if v.number > _WORTH_A_BAR / 1e6}
    return [v for v in values if (v.panel, v.row) in rows]


# --- the page -------------------------------------------------------------------------------------


def _section(figure: Figure) -> str:
    return (
        f"<h2>{html.escape(figure.question)}</h2><p>{html.escape(figure.how)}</p>"
        f"{figure_html(figure.draw(), figure.question)}"
    )


def _means(results: Sequence[Result]) -> str:
    rows = [
        (op, kind, peer, f"{mean:.2f}", f"{lowest:.2f}")
        for op, kind, peer, mean, lowest in geometric_means(results)
    ]
    head = ("op", "kind", "peer", "peer / ours, geometric mean", "lowest")
    return f"<h2>Geometric means</h2>{_table(head, rows)}"


def _details(results: Sequence[Result]) -> str:
    rows = [cells(r) for r in results]
    return f"<details><summary>Every measurement</summary>{_table(COLUMNS, rows)}</details>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"
