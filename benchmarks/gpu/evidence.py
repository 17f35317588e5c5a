"""What a check leaves: rows, on the disk as soon as they are there; findings; the verdict."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
from dataclasses import dataclass, field
from pathlib import Path

# File -> the columns of its rows. With the texts below at most six files.
TABLES = {
    "smoke.csv": (
        "kernel", "case", "tensor", "result", "error", "worst", "nan", "seconds", "map",
    ),
    "speed.csv": (
        "case", "pass", "implementation", "ms", "TFLOP/s", "% of matmul", "error", "note",
    ),
}  # fmt: skip
TEXTS = ("summary.md", "ncu.txt", "tests.txt", "sanitizer.txt")
MOST_BYTES = 300_000  # of a file


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be; ``red`` if the check fails by it."""

    stage: str
    subject: str  # the kernel, the test, the library
    message: str
    red: bool = True

    def __str__(self) -> str:
        return f"{self.stage}: {self.subject}: {self.message}"


@dataclass
class Evidence:
    """The output folder. A full disk loses files, never the verdict: it is printed too."""

    output: Path
    rows: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # (stage, row)
    findings: list[Finding] = field(default_factory=list)
    _written: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def refuse(output: Path) -> str | None:
        """Why nothing can be written to ``output``, or None. It is made if it is not there."""
        probe = output / ".probe"
        try:
            output.mkdir(parents=True, exist_ok=True)
            with probe.open("wb") as file:
                file.write(bytes(1 << 20))  # a full disk takes an empty file
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            kind = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "is not writable"
            return f"the output folder {output} {kind}: {error.strerror or error}"
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
        return None

    def begin(self) -> None:
        """Removes the files of an earlier check, whose rows are not this one's."""
        for name in (*TABLES, *TEXTS):
            (self.output / name).unlink(missing_ok=True)

    def row(self, table: str, stage: str, **values: object) -> None:
        columns = TABLES[table]
        row = {column: str(values.get(column, "")) for column in columns}
        self.rows.append((stage, row))
        lines = io.StringIO()
        writer = csv.DictWriter(lines, columns, lineterminator="\n")
        if table not in self._written:
            writer.writeheader()
        writer.writerow(row)
        self._append(table, lines.getvalue())

    def text(self, name: str, text: str) -> None:
        self._append(name, text if text.endswith("\n") else text + "\n")

    def found(self, stage: str, subject: str, message: str, red: bool = True) -> None:
        finding = Finding(stage, subject, message, red)
        if finding not in self.findings:
            self.findings.append(finding)

    def of_stage(self, stage: str) -> list[dict[str, str]]:
        return [row for name, row in self.rows if name == stage]

    @property
    def red(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.red]

    def _append(self, name: str, text: str) -> None:
        size = self._written.get(name, 0)
        if size > MOST_BYTES:
            return
        if size + len(text) > MOST_BYTES:
            text = text[: MOST_BYTES - size] + "\n[cut off here]\n"
        try:
            with (self.output / name).open("a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.found("output", name, f"cannot be written: {error.strerror or error}")
        self._written[name] = size + len(text)
