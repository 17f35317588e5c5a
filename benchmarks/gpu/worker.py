"""One job of a check, in a process of its own: ``worker.py BENCH JOB ...``.

What it finds it prints as it goes, a line of JSON behind an "@" for each fact; other lines are
kept as a log. Before something that could hang or crash comes a line that names it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Protocol

from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.cases import FAMILIES, PROFILES, Case
from gpu.smoke import KERNELS, cases_of, judge
from gpu.smoke import Case as SmokeCase

OURS = ("cuda", "triton")


class Bench(Protocol):
    """The GPU (hardware.py), or what stands in for it (stand_in.py)."""

    def environment(self) -> dict[str, object]:
        """Names and versions, why the libraries or the GPU cannot be used, the two ceilings."""

    def prepare(self, implementation: str, cases: list[Case]) -> None:
        """What costs time before the first timing: a context, kernels to compile."""

    def smoke(self, kernel: str, case: SmokeCase) -> dict[str, tuple[NDArray, NDArray]]:
        """The kernel's results, and what they should be."""

    def measure(self, implementation: str, case: Case) -> list[dict[str, object]]:
        """Rows of pass, ms and TFLOP/s, of ours with the error that was found before."""

    def profile(self, case: Case, what: str) -> None:
        """Runs the case's pass a few times."""

    def tune(self) -> list[dict[str, object]]:
        """Rows of the tiles that only the tuning build has."""

    def lost(self, error: Exception) -> bool:
        """Whether nothing on the GPU works any more in this process."""


def tell(kind: str, **facts: object) -> None:
    print("@" + json.dumps({"kind": kind, **facts}), flush=True)


def smoke(bench: Bench, kernel: str, only: str) -> int:
    bench.prepare("cuda", [])
    good = True
    for case in cases_of(kernel):
        if only not in ("", case.name):
            continue
        tell("begin", what=case.name)
        start = time.monotonic()
        try:
            results = bench.smoke(kernel, case)
        except Exception as error:  # what it is goes into the table
            tell("row", case=case.name, tensor="", result="FAILED", error=_first_line(error))
            if bench.lost(error):
                return 1
            good = False
            continue
        seconds = f"{time.monotonic() - start:.2f}"
        for name, (actual, expected) in results.items():
            j = judge(actual, expected, case.dtype)
            tell("row", case=case.name, tensor=name, result="ok" if j.passed else "WRONG",
                 error=f"{j.error:.2e}", worst=f"{j.worst:.2e}", nan=j.nan, seconds=seconds,
                 map=j.map)  # fmt: skip
            good &= j.passed
    return 0 if good else 1


def speed(bench: Bench, implementation: str, families: list[str], failed: set[str]) -> int:
    """Gets ready, then waits for a line on stdin: no two are timed at once."""
    bench.prepare(implementation, [case for family in families for case in FAMILIES[family]])
    tell("ready")
    if not sys.stdin.readline():
        return 0
    for family in families:
        for case in FAMILIES[family]:
            bad = sorted(failed.intersection(case.stands_on))
            if bad and implementation == "cuda":
                tell("row", case=case.name, implementation=implementation,
                         note=f"left out: {', '.join(bad)} failed the smoke test")  # fmt: skip
                continue
            tell("begin", what=case.name)
            try:
                for row in bench.measure(implementation, case):
                    tell("row", case=case.name, implementation=implementation, **row)
            except Exception as error:
                tell("failed", what=case.name, error=_first_line(error))
                if bench.lost(error):
                    return 1
    return 0


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(description=__doc__)
    root.add_argument("bench", choices=("hardware", "stand_in"))
    jobs = root.add_subparsers(dest="job", required=True)
    jobs.add_parser("environment")
    job = jobs.add_parser("smoke")
    job.add_argument("kernel", choices=KERNELS)
    job.add_argument("--only", default="", help="one of its cases")
    job = jobs.add_parser("speed")
    job.add_argument("implementation")
    job.add_argument("families", nargs="+", choices=FAMILIES)
    job.add_argument("--failed", default="", help="kernels, with commas between")
    job = jobs.add_parser("profile")
    job.add_argument("kernel", choices=PROFILES)
    jobs.add_parser("tune")
    return root


def main() -> int:
    options = parser().parse_args()
    bench: Bench = importlib.import_module(f"gpu.{options.bench}").Bench()
    if options.job == "environment":
        tell("environment", **bench.environment())
        return 0
    if options.job == "smoke":
        return smoke(bench, options.kernel, options.only)
    if options.job == "speed":
        failed = set(filter(None, options.failed.split(",")))
        return speed(bench, options.implementation, options.families, failed)
    if options.job == "profile":
        _, case, what = PROFILES[options.kernel]
        bench.profile(case, what)
        return 0
    for row in bench.tune():
        tell("row", **row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
