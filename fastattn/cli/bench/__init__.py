"""``fastattn bench``: our kernels beside torch's, paired, on the layers of real models, and whole
models beside what else runs them."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastattn import __version__, _extension
from fastattn.cli.bench import cases, measure, report
from fastattn.cli.bench.case import Case
from fastattn.cli.bench.measure import Result, Roofline
from fastattn.cli.bench.whole.cases import whole_model_cases
from fastattn.cli.bench.whole.engines import ENGINES, missing


def bench(options: argparse.Namespace, console: Console | None = None) -> int:
    """Runs the chosen cases. 1 if a result was wrong, 2 for arguments that make no sense."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)
    try:
        old = report.read_csv(options.compare) if options.compare else None
    except (OSError, ValueError) as error:
        print(f"fastattn bench: --compare: {error}", file=sys.stderr)
        return 2
    try:
        chosen = [c for c in _cases(options) if options.filter.lower() in " ".join(c.key).lower()]
    except ImportError as error:
        print(
            f"fastattn bench: --models: expected transformers to be installed, got {error}; "
            "pip install 'fastattn[bench]'",
            file=sys.stderr,
        )
        return 2
    if not chosen:
        print(f"fastattn bench: --filter: no case contains {options.filter!r}", file=sys.stderr)
        return 2
    if options.models:
        for line in _left_out():
            console.print(line)
    results, roofline = _measure_all(chosen, options.seconds, console)
    title = _title(roofline)
    console.print(report.table(title, results))
    console.print(report.means_table(results))
    if old is not None:
        console.print(report.comparison(old, results))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        report.write_csv(options.output / "bench.csv", results)
        console.print(f"table: {options.output / 'bench.csv'}")
        _write_page(options.output / "bench.html", title, results, console)
    return 1 if any(r.error for r in results) else 0


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    yield from cases.cases(options.op, options.peers, options.grid)
    if options.models:
        yield from whole_model_cases(options.peers, options.grid, options.quick)


def _left_out() -> Iterator[str]:
    for engine in ENGINES:
        packages = missing(engine)
        if packages:
            yield (
                f"{engine}: not timed, without {', '.join(packages)}; "
                "pip install 'fastattn\\[bench]'"
            )


def _measure_all(
    chosen: list[Case], budget: float, console: Console
) -> tuple[list[Result], Roofline]:
    results: list[Result] = []
    roofline = measure.probe()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=f"{case.op} {case.name}")
            results += measure.measure(case, budget)
            roofline = roofline.best(measure.probe())
            progress.advance(task)
    return [dataclasses.replace(r, roofline=roofline) for r in results], roofline


def _write_page(path: Path, title: str, results: list[Result], console: Console) -> None:
    try:
        from fastattn.cli.bench.figures import write_html

        write_html(path, title, results)
    except ImportError as error:
        console.print(f"no page: {error}; pip install 'fastattn\\[bench]'")
    else:
        console.print(f"page: {path}")


def _title(roofline: Roofline) -> str:
    return (
        f"fastattn {__version__} ({_extension.cpu_isa() or 'no native library'}), "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {platform.machine()}, "
        f"measured roofline {roofline.flops / 1e9:.0f} GFLOP/s float32, "
        f"{roofline.flops_bf16 / 1e9:.0f} bfloat16, "
        f"{roofline.bytes / 1e9:.1f} GB/s"
    )
