"""``fastattn demo``: real data, stock torch beside fastattn, one table and one report."""

from __future__ import annotations

import argparse
import importlib.util
import os

from rich.console import Console
from rich.table import Table

_NEEDED = ("sklearn", "matplotlib", "transformers", "accelerate")


def demo(options: argparse.Namespace) -> int:
    """Runs the parts that were asked for; 0 when each did what it shows."""
    console = Console(width=max(Console().width, 150))  # the table needs the room
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        console.print(f"the demo needs {', '.join(missing)}: pip install 'fastattn\\[demo]'")
        return 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Imported here: these modules need the packages checked above.
    from transformers.utils import logging

    from fastattn.cli.demo.bert import run_bert
    from fastattn.cli.demo.digits import run_digits
    from fastattn.cli.demo.report import HEADER, write_report
    from fastattn.cli.demo.sentences import run_sentences

    logging.set_verbosity_error()  # a new classification head is no surprise here
    logging.disable_progress_bar()
    only = options.only
    tasks = run_digits(options, console) if only in (None, "digits") else []
    tasks += [run_bert(options, console)] if only in (None, "bert") else []
    tasks += [run_sentences(options, console)] if only in (None, "sentences") else []

    table = Table(title="stock torch beside fastattn", title_justify="left")
    for column in HEADER:
        table.add_column(column)
    for row in (row for task in tasks for row in task.rows()):
        table.add_row(*row)
    console.print(table)
    path = write_report(options.output, tasks)
    console.print(f"report: {path.resolve()}")
    good = all(task.good for task in tasks)
    if not good:
        console.print("[red]a check failed: see the last column[/]")
    return 0 if good else 1
