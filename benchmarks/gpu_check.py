"""Everything for a machine with a GPU in one command: ``make gpu-check``.

Uses the Python that runs it, with its torch and Triton, and the libraries of ``make gpu-bundle``
where the folder gpu-bundle is there. Runs in stages (benchmarks/README.md): two measured ceilings,
every kernel alone on small problems, speed, profiles, tests, tiles, sanitizer. Writes at most six
files into ``--output`` as it goes and ends with one table. Exit status 0: green, 1: red, 2: the
machine or the folder cannot be used, and nothing was written.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gpu.check import Check
from gpu.evidence import Evidence
from gpu.plan import ROOT, plan_of_hardware
from gpu.rehearsal import rehearse_all
from gpu.summary import summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"))
    parser.add_argument("--seconds", type=float, default=520, help="for everything")
    parser.add_argument("--libraries", type=Path, help="a folder of `make gpu-bundle`")
    parser.add_argument("--triton-only", action="store_true", help="on any GPU from 8.0 on")
    parser.add_argument("--tune", action="store_true", help="time Triton's tiles instead")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, with faults")
    options = parser.parse_args()
    if options.rehearse:
        return rehearse_all()
    libraries = options.libraries or ROOT / "gpu-bundle"
    if options.libraries is not None and not (libraries / "_cuda.so").exists():
        return _refuse(f"--libraries: expected a folder with _cuda.so, got {libraries}")
    found = libraries.resolve() if (libraries / "_cuda.so").exists() else None
    output = options.output.resolve()
    if (why := Evidence.refuse(output)) is not None:
        return _refuse(why)
    evidence = Evidence(output)
    check = Check(plan_of_hardware(found, options.triton_only), evidence, options.seconds)
    if (why := check.refused()) is not None:
        return _refuse(why)
    evidence.begin()
    if options.tune:
        return _tune(evidence, time.monotonic() + options.seconds - 30)
    try:
        green = check.run()
    except Exception as error:  # of the check itself: what it has found is told all the same
        evidence.found("the check", type(error).__name__, str(error)[:300])
        green = False
    page = summary(check.facts, check.spent, evidence)
    evidence.text("summary.md", page)
    print(page, flush=True)
    return 0 if green else 1


def _tune(evidence: Evidence, stop: float) -> int:
    from gpu.hardware import Bench
    from gpu.tune import triton_tiles

    for row in triton_tiles(Bench(), stop):
        evidence.row("speed.csv", "tune", **row)
        print(*row.values(), flush=True)
    return 0


def _refuse(why: str) -> int:
    print(f"gpu-check: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
