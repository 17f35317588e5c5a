"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from fastattn.cli.demo.bert import BertResult
from fastattn.cli.demo.digits import DigitsResult
from fastattn.cli.page import figure_html, page, plt


def _digits_curves(results: Sequence[DigitsResult]) -> str:
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3), sharey=True)
    for ax, result in zip(axes, results, strict=True):
        for curve, label, style in zip(
            result.losses, ("torch", "fastattn"), ("-", "--"), strict=True
        ):
            ax.plot(curve, style, label=label, linewidth=1)
        ax.set(title=result.optimizer, xlabel="step", yscale="log")
    axes[0].set_ylabel("cross-entropy")
    axes[0].legend()
    return figure_html(figure, "Loss over steps of the digit classifiers")


def _bert_curves(result: BertResult) -> str:
    figure, ax = plt.subplots(figsize=(8, 3))
    for run, style in zip(result.runs, ("-", "--", ":"), strict=True):
        steps = [5 * (i + 1) for i in range(len(run.losses))]
        ax.plot(steps, run.losses, style, label=run.implementation)
    ax.set(xlabel="step", ylabel="cross-entropy")
    ax.legend()
    return figure_html(figure, "Loss over steps of the BERT fine-tuning")


def _speed(digits: Sequence[DigitsResult], bert: BertResult | None) -> str:
    bars = {f"{r.data}\n{r.optimizer}": r.speedup for r in digits}
    if bert is not None:
        names = ("patched", "compiled")
        for name, run in zip(names, bert.runs[1:], strict=True):
            bars[f"BERT fine-tuning\n{name}"] = run.speedup
    figure, ax = plt.subplots(figsize=(8, 3))
    ax.bar(list(bars), list(bars.values()), width=0.5)
    ax.axhline(1.0, color="black", linewidth=1)
    ax.set_ylabel("speed, torch = 1")
    return figure_html(figure, "Training speed relative to torch")


def write_report(
    folder: Path,
    digits: Sequence[DigitsResult],
    bert: BertResult | None,
    rows: Sequence[Sequence[str]],
) -> Path:
    """Writes ``report.html`` into ``folder`` and returns its path."""
    header = ("task", "implementation", "accuracy", "recall", "F1", "speed", "check")
    table = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    head = "".join(f"<th>{name}</th>" for name in header)
    parts = [f"<h1>fastattn demo</h1><table><tr>{head}</tr>{table}</table>"]
    if digits:
        parts.append(f"<h2>Digits: loss of both implementations</h2>{_digits_curves(digits)}")
    if bert is not None:
        parts.append(
            f"<h2>BERT fine-tuning</h2><p>{bert.sizes[0]} sentences to learn from, "
            f"{bert.sizes[1]} from other modules to be judged by; "
            f"the most frequent class is {bert.majority:.1%} of them.</p>"
            f"{_bert_curves(bert)}"
            + "".join(f"<pre>{html.escape(run.report)}</pre>" for run in bert.runs[1:])
        )
    parts.append(f"<h2>Speed</h2>{_speed(digits, bert)}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    path.write_text(page("fastattn demo", "".join(parts)), encoding="utf-8")
    return path
