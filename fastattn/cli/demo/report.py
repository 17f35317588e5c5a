"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from fastattn.cli.demo.compare import Task
from fastattn.cli.demo.profile import KINDS
from fastattn.cli.page import figure_html, page, plt

HEADER = ("task", "implementation", "accuracy", "recall", "F1", "speed", "peak MB", "check")
_STYLES = ("-", "--", ":", "-.")


def _speed(tasks: Sequence[Task]) -> str:
    """A group of bars for each task, the fastest implementation's name beside its bar."""
    rows = sum(len(task.runs) for task in tasks)
    figure, ax = plt.subplots(figsize=(9, 0.34 * (rows + len(tasks)) + 0.8))
    place, places, names = 0.0, [], []
    for task in tasks:
        ax.text(0.0, place - 0.65, task.name, weight="bold", va="center", fontsize=9)
        for run in task.runs:
            stock = run is task.runs[0]
            speed = run.speed
            error = None if stock else [[speed.median - speed.low], [speed.high - speed.median]]
            color = "0.72" if stock else "tab:blue"
            ax.barh(place, speed.median, 0.7, color=color, xerr=error, ecolor="0.3", capsize=2)
            end = max(speed.high, speed.median)
            ax.text(end + 0.05, place, f"{speed.median:.2f}x", va="center", fontsize=9)
            places.append(place)
            names.append(run.implementation)
            place += 1
        place += 1
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_yticks(places, names, fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.set_xlabel("times as fast as stock torch (line: half of the steps lie within)")
    ax.spines[["top", "right"]].set_visible(False)
    return figure_html(figure, "Speed of each implementation relative to stock torch, by task")


def _curves(tasks: Sequence[Task]) -> str:
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3), squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        for i, run in enumerate(task.runs):
            steps = [task.step * (n + 1) for n in range(len(run.losses))]
            style = _STYLES[i % len(_STYLES)]
            ax.plot(steps, run.losses, style, label=run.implementation, linewidth=1)
        ax.set(title=task.name, xlabel="step", yscale="log" if task.step == 1 else "linear")
        ax.title.set_fontsize(9)
        ax.legend(fontsize=6)
    axes[0][0].set_ylabel("cross-entropy")
    figure.tight_layout()
    return figure_html(figure, "Loss over steps of every implementation")


def _where(task: Task) -> str:
    """One bar for each implementation, its step cut into kinds of work."""
    figure, ax = plt.subplots(figsize=(9, 0.45 * len(task.runs) + 1.3))
    runs = [run for run in task.runs if run.seconds]
    left = [0.0] * len(runs)
    colors = plt.get_cmap("tab10").colors
    for kind, color in zip(KINDS, colors, strict=False):
        widths = [1e3 * run.seconds[kind] for run in runs]
        ax.barh(range(len(runs)), widths, 0.65, left=left, label=kind, color=color)
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.06 * 1e3 * max(sum(r.seconds.values()) for r in runs):
                ax.text(start + width / 2, row, f"{width:.0f}", ha="center", va="center",
                        color="white", fontsize=8)  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    ax.set_yticks(range(len(runs)), [run.implementation for run in runs], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel(
        "milliseconds of a training step, by kind of work "
        "(ours: an activation is part of its linear layer, dropout of its norm)",
        fontsize=8,
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.3))
    return figure_html(figure, "Time of a training step by kind of work, stock torch beside ours")


def write_report(folder: Path, tasks: Sequence[Task]) -> Path:
    """Writes ``report.html`` into ``folder`` and returns its path."""
    parts = ["<h1>fastattn demo</h1>", "<h2>How many times faster?</h2>", _speed(tasks)]
    cells = (row for task in tasks for row in task.rows())
    table = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells
    )
    head = "".join(f"<th>{name}</th>" for name in HEADER)
    parts.append(f"<h2>Quality, speed, memory</h2><table><tr>{head}</tr>{table}</table>")
    parts += [f"<p>{html.escape(f'{t.name}: {t.about}')}</p>" for t in tasks if t.about]
    for task in tasks:
        if any(run.seconds for run in task.runs):
            parts.append(f"<h2>Where the time goes: {html.escape(task.name)}</h2>{_where(task)}")
    trained = [task for task in tasks if task.runs[0].losses]
    if trained:
        parts.append(f"<h2>Loss while training</h2>{_curves(trained)}")
    reports = [(t.name, r) for t in tasks for r in t.runs if r.report]
    for name, run in reports:
        title = html.escape(f"{name}: {run.implementation}")
        parts.append(
            f"<details><summary>What changed: {title}</summary>"
            f"<pre>{html.escape(run.report)}</pre></details>"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    path.write_text(page("fastattn demo", "".join(parts)), encoding="utf-8")
    return path
