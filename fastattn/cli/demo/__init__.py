"""``fastattn demo``: real data, stock torch beside fastattn, one table and one report."""

from __future__ import annotations

import argparse
import importlib.util

from rich.console import Console
from rich.table import Table

_NEEDED = ("sklearn", "matplotlib", "transformers", "accelerate")


def demo(options: argparse.Namespace) -> int:
    """Runs the parts that were asked for; 0 when each did what it shows."""
    console = Console(width=max(Console().width, 120))  # the table needs the room
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        console.print(f"the demo needs {', '.join(missing)}: pip install 'fastattn\\[demo]'")
        return 1
    # Imported here: these modules need the packages checked above.
    from fastattn.cli.demo.bert import run_bert
    from fastattn.cli.demo.digits import run_digits
    from fastattn.cli.demo.report import write_report

    digits = run_digits(options, console) if options.only != "bert" else []
    bert = run_bert(options, console) if options.only != "digits" else None

    table = Table(title="stock torch beside fastattn", title_justify="left")
    for column in ("task", "implementation", "accuracy", "recall", "F1", "speed", "check"):
        table.add_column(column)
    rows = [row for result in digits for row in result.rows()]
    rows += bert.rows() if bert is not None else []
    for row in rows:
        table.add_row(*row)
    console.print(table)
    path = write_report(options.output, digits, bert, rows)
    console.print(f"report: {path.resolve()}")
    good = all(r.good for r in digits) and (bert is None or options.quick or bert.all_good)
    if not good:
        console.print("[red]a check failed: see the last column[/]")
    return 0 if good else 1
