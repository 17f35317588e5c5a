"""Charts that the page is made of: grouped bars in panels, points in rows, lines in panels."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fastattn.cli.page import plt

_COLORS = ("#2f6db5", "#e08214", "#4d9a52", "#a05195", "#7f7f7f", "#c23b4e", "#17a2a8")
# Series that have their color in every figure, in their order; others follow, in colors in turn.
_FIXED = {
    "forward": 0, "backward": 1, "step": 2, "jvp": 3, "double backward": 5,
    "fastattn": 0, "fastattn patched": 0, "fastattn compiled": 1, "sdpa": 4, "eager": 4,
    "eager float32": 5, "sdpa math": 5, "torch.compile": 6, "ONNX Runtime": 2, "OpenVINO": 3,
}  # fmt: skip
_LOG_FROM = 30.0  # the largest value over the smallest, from where on a scale is logarithmic
_STEPS = ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5, 7, 8, 9))
_WIDTH = 11.0  # inches, of the whole figure


class Value(NamedTuple):
    """A number of a chart: its panel, its row or its place on the x axis, the series it is of."""

    panel: str
    row: str
    series: str
    number: float


def unique(names: Iterable[str]) -> list[str]:
    """In the order of their first appearance."""
    return list(dict.fromkeys(names))


def ratio_bars(values: Sequence[Value], label: str) -> plt.Figure:
    """Bars that leave 1, on a logarithmic scale: as far to the right for 2 as to the left for
    0.5."""
    return _bars(values, label, lambda ax, at, x, **style: ax.barh(at, x - 1, left=1, **style), 1.0)


def amount_bars(values: Sequence[Value], label: str) -> plt.Figure:
    """Bars from 0; from the left edge where the scale has to be logarithmic."""
    return _bars(values, label, lambda ax, at, x, **style: ax.barh(at, x, **style), None)


def _bars(
    values: Sequence[Value], label: str, draw: Callable[..., Any], line: float | None
) -> plt.Figure:
    figure, axes, lanes = _panels(values, label, inches_a_lane=0.14)
    height = 0.9 * lanes.height
    for panel, ax in axes.items():
        _scale(ax, [v.number for v in values], line)
        for v in (v for v in values if v.panel == panel):
            right = line is None or v.number >= line
            draw(ax, lanes.at(v), v.number, height=height, color=lanes.color(v.series))
            ax.annotate(
                _short(v.number), (v.number, lanes.at(v)), xytext=(2 if right else -2, 0),
                textcoords="offset points", va="center", fontsize=6,
                ha="left" if right else "right",
            )  # fmt: skip
        if line is not None:
            ax.axvline(line, color="black", linewidth=0.8)
    return figure


class _Lanes:
    """Where numbers stand: a row of a chart has a lane for each series that it has numbers of."""

    def __init__(self, values: Sequence[Value]) -> None:
        self.rows = unique(v.row for v in values)
        order = [*_FIXED, *(v.series for v in values)]
        self.series = sorted(unique(v.series for v in values), key=order.index)
        present = {(v.row, v.series) for v in values}
        self.lanes = {
            row: [name for name in self.series if (row, name) in present] for row in self.rows
        }
        self.most = max(map(len, self.lanes.values()))
        self.height = 0.8 / self.most  # in rows

    def at(self, v: Value) -> float:
        lanes = self.lanes[v.row]
        middle = (len(lanes) - 1) / 2
        return self.rows.index(v.row) + (lanes.index(v.series) - middle) * self.height

    def color(self, series: str) -> str:
        return _COLORS[_FIXED.get(series, self.series.index(series)) % len(_COLORS)]


def _panels(
    values: Sequence[Value], label: str, inches_a_lane: float
) -> tuple[plt.Figure, dict[str, Any], _Lanes]:
    """An empty chart: its panels beside each other share the rows."""
    names, lanes = unique(v.panel for v in values), _Lanes(values)
    height = 0.9 + len(lanes.rows) * max(0.24, inches_a_lane * lanes.most + 0.06)
    figure, (axes,) = plt.subplots(
        1, len(names), sharey=True, squeeze=False, figsize=(_WIDTH, height), layout="constrained"
    )
    for name, ax in zip(names, axes, strict=True):
        ax.set_title(name, fontsize=8)
        ax.set_xlabel(label, fontsize=7)
        ax.tick_params(labelsize=7, length=2)
        for i in range(1, len(lanes.rows), 2):
            ax.axhspan(i - 0.5, i + 0.5, color="#000000", alpha=0.045, linewidth=0)
        ax.grid(axis="x", linewidth=0.4, alpha=0.4)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(lanes.rows)), lanes.rows, fontsize=7)
    axes[0].set_ylim(len(lanes.rows) - 0.5, -0.5)
    if len(lanes.series) > 1:
        swatch = functools.partial(plt.Rectangle, (0, 0), 1, 1)
        _legend(figure, {name: swatch(color=lanes.color(name)) for name in lanes.series})
    return figure, dict(zip(names, axes, strict=True)), lanes


def _legend(figure: plt.Figure, handles: dict[str, Any]) -> None:
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncol=min(len(handles), 7),
        fontsize=8, frameon=False,
    )  # fmt: skip


def _scale(ax: Any, numbers: Sequence[float], line: float | None) -> None:
    """The x axis, with place for the numbers behind the bars."""
    low, high = min(numbers), max(numbers)
    if line is None and not (low > 0 and high / low > _LOG_FROM):
        ax.set_xlim(0, 1.15 * high or 1.0)
        return
    if line is None:
        low /= 1.5
    else:
        low, high = min(low, line), max(high, 1.5 * line)
    span = high / low
    ax.set_xscale("log")
    ax.set_xlim(low / span ** (0.12 if line is not None and low < line else 0.02), high * span**0.2)
    _ticks(ax.xaxis, *ax.get_xlim())


def _ticks(axis: Any, low: float, high: float) -> None:
    """Round numbers at a logarithmic axis, four or more where there is place."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in _STEPS:
        found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(found) >= 4:
            break
    apart = (high / low) ** 0.06
    for x in list(found):
        if any(y < x < y * apart for y in found):
            found.remove(x)
    axis.set_ticks(found, [f"{x:g}" for x in found])
    axis.set_ticks([], minor=True)


def _short(x: float) -> str:
    """Three digits, or all before the point."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def points(values: Sequence[Value], label: str, line: float) -> plt.Figure:
    """A point a number, a lane a series; a bar marks a lane's median, which is written at its
    end."""
    figure, axes, lanes = _panels(values, label, inches_a_lane=0.19)
    for panel, ax in axes.items():
        groups: dict[tuple[str, str], list[Value]] = defaultdict(list)
        for v in values:
            if v.panel == panel:
                groups[v.row, v.series].append(v)
        for found in groups.values():
            at, color, numbers = (
                lanes.at(found[0]),
                lanes.color(found[0].series),
                [v[3] for v in found],
            )
            middle = statistics.median(numbers)
            ax.plot(numbers, [at] * len(numbers), "o", color=color, markersize=3.5, alpha=0.45)
            ax.plot([middle], [at], "|", color=color, markersize=9, markeredgewidth=2)
            ax.annotate(
                f"median {middle:.0f}", (max(numbers), at), xytext=(5, 0), va="center", fontsize=6,
                textcoords="offset points",
            )  # fmt: skip
        ax.axvline(line, color="black", linewidth=0.8)
        ax.set_xlim(0, 1.15 * max(line, *(v.number for v in values)))
    return figure


def ratio_lines(
    values: Sequence[Value], kinds: tuple[str, str], x_label: str, y_label: str
) -> plt.Figure:
    """Lines over ``row``, which is a number; a panel "a, b" stands in row ``a`` and column ``b``,
    and the panels of a row share their axis. ``kinds``: the ends of names of dashed series and of
    others; names without them have a color each. The highest and the lowest number are written."""
    down, across = (unique(v.panel.split(", ")[i] for v in values) for i in range(2))
    figure, axes = plt.subplots(
        len(down), len(across), sharex=True, sharey="row", squeeze=False, layout="constrained",
        figsize=(_WIDTH, 0.8 + 2.4 * len(down)),
    )  # fmt: skip
    lengths = sorted({int(v.row) for v in values})
    handles: dict[str, Any] = {}
    for (i, a), (j, b) in itertools.product(enumerate(down), enumerate(across)):
        ax = axes[i][j]
        here = [v for v in values if v.panel == f"{a}, {b}"]
        handles |= _draw_lines(ax, here, unique(_kind(v, kinds) for v in values), kinds)
        ax.axhline(1.0, color="black", linewidth=0.8)
        ax.set_title(f"{a}, {b}", fontsize=8)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.xaxis.set_ticks(lengths, [str(n) for n in lengths])
        ax.xaxis.set_ticks([], minor=True)
        ax.tick_params(labelsize=7)
        ax.grid(linewidth=0.4, alpha=0.4)
        ax.set_xlabel(x_label if i == len(down) - 1 else "", fontsize=7)
        ax.set_ylabel(y_label if j == 0 else "", fontsize=7)
    for a, row in zip(down, axes, strict=True):
        numbers = [v.number for v in values if v.panel.split(", ")[0] == a]
        row[0].set_ylim(min(0.8, min(numbers) / 1.3), max(numbers) * 1.3)
        for ax in row:
            _ticks(ax.yaxis, *ax.get_ylim())
    _legend(figure, handles)
    return figure


def _kind(v: Value, kinds: tuple[str, str]) -> str:
    return v.series.removesuffix(kinds[0]).removesuffix(kinds[1])


def _draw_lines(
    ax: Any, values: Sequence[Value], colors: Sequence[str], kinds: tuple[str, str]
) -> dict[str, Any]:
    """The lines by name."""
    drawn = {}
    for name in unique(v.series for v in values):
        line = sorted((v for v in values if v.series == name), key=lambda v: int(v.row))
        color = _COLORS[colors.index(_kind(line[0], kinds)) % len(_COLORS)]
        (drawn[name],) = ax.plot(
            [int(v.row) for v in line], [v.number for v in line], color=color, marker="o",
            markersize=3, linewidth=1.2, linestyle="--" if name.endswith(kinds[0]) else "-",
        )  # fmt: skip
    for row in unique(v.row for v in values):
        numbers = [v.number for v in values if v.row == row]
        for number, offset, where in ((max(numbers), 4, "bottom"), (min(numbers), -4, "top")):
            ax.annotate(
                _short(number), (int(row), number), xytext=(0, offset), va=where, ha="center",
                textcoords="offset points", fontsize=6,
            )  # fmt: skip
    return drawn
