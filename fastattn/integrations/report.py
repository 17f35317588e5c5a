"""What ``patch``, ``unpatch`` and the compiler backend report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from rich.table import Table


@dataclass(frozen=True)
class Entry:
    """One module: its qualified name, what it was, what it became (None: left alone), and why."""

    name: str
    before: str
    after: str | None
    reason: str


@dataclass
class Report:
    """What became of a model's parts, and why. ``print`` gives lines, ``rich.print`` a table."""

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # on modules that have no entry

    def add(self, name: str, before: object, after: object | None, reason: str) -> None:
        """before, after: a module or its class, named by the class, or a string."""
        self.entries.append(
            Entry(name or "(root)", _kind(before), None if after is None else _kind(after), reason)
        )

    @property
    def swapped(self) -> list[Entry]:
        """The entries of parts that became something else."""
        return [e for e in self.entries if e.after is not None]

    @property
    def skipped(self) -> list[Entry]:
        """The entries of parts that were left alone."""
        return [e for e in self.entries if e.after is None]

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        """How many parts went from what to what."""
        return Counter((e.before, e.after or "") for e in self.swapped)

    def summary(self) -> str:
        """One line: how many parts became what."""
        raise NotImplementedError

    def _counted(self, nothing: str) -> str:
        swaps = ", ".join(f"{n} {before} -> {after}" for (before, after), n in self.counts.items())
        return f"{swaps or nothing}; {len(self.skipped)} left alone"

    def __str__(self) -> str:
        lines = [self.summary()]
        lines += [
            f"  {e.name}: {e.before} -> {e.after}: {e.reason}" for e in _grouped(self.swapped)
        ]
        lines += [f"  {e.name}: {e.before} left alone: {e.reason}" for e in self.skipped]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)

    def __rich__(self) -> Table:
        table = Table("module", "was", "is", "why", title=self.summary(), title_justify="left")
        table.caption = "\n".join(self.notes) or None
        table.caption_justify = "left"
        for e in (*_grouped(self.swapped), *self.skipped):
            table.add_row(e.name, e.before, e.after or "(left alone)", e.reason)
        return table


_MOST_LINES = 3  # of parts that became the same for the same reason; more are one line


def _grouped(entries: list[Entry]) -> list[Entry]:
    """The entries to print: the layers of a stack, which are alike, by their first one."""
    alike = Counter((e.before, e.after, e.reason) for e in entries)
    printed, seen = [], set()
    for e in entries:
        kind = (e.before, e.after, e.reason)
        count = alike[kind]
        if count <= _MOST_LINES:
            printed.append(e)
        elif kind not in seen:
            seen.add(kind)
            printed.append(replace(e, name=f"{e.name} (and {count - 1} more)"))
    return printed


@dataclass
class PatchReport(Report):
    """What ``patch`` or ``unpatch`` swapped, what it left alone, and why.

    ``swapped`` and ``skipped`` are lists of ``Entry``; ``notes`` are lines on modules that have
    none; ``print`` gives lines, ``rich.print`` a table.

    >>> import fastattn
    >>> from torch import nn
    >>> report = fastattn.patch(nn.TransformerEncoderLayer(64, 4, 128))
    >>> [(entry.before, entry.after) for entry in report.swapped][0]
    ('TransformerEncoderLayer', 'fastattn TransformerEncoderLayer')
    """

    dry_run: bool = False  # nothing was changed: the entries say what would be
    nothing: str = "nothing to swap"  # what it says without entries

    def summary(self) -> str:
        who = "fastattn (dry run)" if self.dry_run else "fastattn"
        return f"{who}: {self._counted('nothing swapped') if self.entries else self.nothing}"


@dataclass
class CompileReport(Report):
    """What ``torch.compile(backend="fastattn")`` fused in the graphs that it was given, what it
    left alone, and why. ``graphs`` counts the graphs; the rest is as in ``PatchReport``."""

    graphs: int = 0

    def summary(self) -> str:
        graphs = f"{self.graphs} graph{'s' * (self.graphs != 1)}"
        return f"fastattn: {graphs}; {self._counted('nothing fused')}"


def _kind(x: object) -> str:
    if isinstance(x, str):
        return x
    kind = x if isinstance(x, type) else type(x)
    if "_fastattn_name" in vars(kind):  # a class that goes by the name of the one it stands for
        return str(vars(kind)["_fastattn_name"])
    ours = kind.__module__.startswith("fastattn.")
    return f"fastattn {kind.__qualname__}" if ours else kind.__name__
