"""The check itself, checked: the same stages run stand-ins for the kernels, with a fault in one.

Every fault must turn the verdict red and be named, and every stage that does not depend on what
failed must deliver its rows in its box.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from gpu.check import Check
from gpu.evidence import Evidence
from gpu.plan import BOXES, ROOT, Plan
from gpu.summary import summary

# Fault -> what it is called in FASTATTN_REHEARSED_FAULT, what the findings must name, and the
# stages that it leaves without rows.
FAULTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "nothing": ("", (), ()),
    "a kernel hangs": (
        "hang:attention_backward128", ("attention_backward128", "test_attention[2]"), (),
    ),
    "a kernel crashes": ("crash:linear_grad_weight", ("linear_grad_weight",), ()),
    "a sticky error": (
        "sticky:attention_forward64", ("attention_forward64", "test_attention[1]"), (),
    ),
    "a wrong result": ("wrong:mlp_forward", ("mlp_forward",), ()),
    "a missing library": (
        "missing:library", ("_cuda.so",),
        ("smoke", "speed", "profile", "Hopper tests", "tune", "sanitizer"),
    ),
    "a peer dies": ("peer:cudnn", ("cudnn",), ()),
}  # fmt: skip
STAGES = tuple(stage for stage in BOXES if stage != "environment")
# Seconds of a rehearsal, and of a process in it: room for a machine that is busy otherwise too.
SECONDS, CLOCK = 240.0, 15.0


@dataclass(frozen=True)
class Rehearsal:
    fault: str
    green: bool
    seconds: float
    spent: dict[str, float]
    evidence: Evidence
    page: str

    @property
    def wrong(self) -> list[str]:
        """What is not as a check must be under this fault."""
        _, culprits, silent = FAULTS[self.fault]
        found = []
        if self.green != (self.fault == "nothing"):
            found.append(f"the verdict is {'green' if self.green else 'red'}")
        named = [finding.subject + " " + finding.message for finding in self.evidence.red]
        found += [
            f"{culprit} is not named"
            for culprit in culprits
            if not any(culprit in text for text in named)
        ]
        for stage in STAGES:
            rows = len(self.evidence.of_stage(stage))
            if stage not in silent and not rows:
                found.append(f"{stage} delivered nothing")
            if self.spent.get(stage, 0.0) > BOXES[stage] + 2.0:
                found.append(f"{stage} took {self.spent[stage]:.0f} s, beyond its box")
        return found


def stand_in_plan(fault: str) -> Plan:
    """``fault`` as FASTATTN_REHEARSED_FAULT has it."""
    environment = dict(os.environ)
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)]),
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "FASTATTN_REHEARSED_FAULT": fault,
    }
    tool = (sys.executable, str(ROOT / "benchmarks/gpu/rehearsal_tool.py"))
    tests = (str(ROOT / "benchmarks/gpu/rehearsal_tests.py"), "--noconftest")
    return Plan(
        "stand_in",
        environment,
        {**BOXES, "sanitizer": 10.0},  # which it takes whole where a kernel hangs
        start_clock=CLOCK,
        smoke_clock=CLOCK,
        speed_clock=CLOCK,
        profile_clock=CLOCK,
        test_clock=CLOCK,
        triton_test_clock=CLOCK,
        build_clock=CLOCK,
        profiler=tool,
        sanitizer=tool,
        hopper_tests=tests,
        triton_tests=tests,
        shards=2,
        compile_ahead=(sys.executable, "-c", "print('compiled')"),
        build=(sys.executable, "-c", "raise SystemExit('a rehearsal builds nothing')"),
    )


def rehearse(fault: str, output: Path) -> Rehearsal:
    evidence = Evidence(output)
    start = time.monotonic()
    check = Check(stand_in_plan(FAULTS[fault][0]), evidence, SECONDS)
    if refused := check.refused():
        raise RuntimeError(refused)
    evidence.begin()
    green = check.run()
    page = summary(check.facts, check.spent, evidence)
    return Rehearsal(fault, green, time.monotonic() - start, check.spent, evidence, page)


def rehearse_all() -> int:
    """Prints a table of the faults and of what was still delivered; 1 if one is not handled."""
    lines, good = [], True
    with tempfile.TemporaryDirectory() as folder:
        for number, fault in enumerate(FAULTS):
            output = Path(folder) / str(number)
            output.mkdir()
            rehearsal = rehearse(fault, output)
            rows = " ".join(
                str(len(rehearsal.evidence.of_stage(s))) for s in BOXES if s != "environment"
            )
            named = "; ".join(str(f)[:70] for f in rehearsal.evidence.red[:1]) or "-"
            verdict = "green" if rehearsal.green else "red"
            wrong = "; ".join(rehearsal.wrong)
            good &= not wrong
            lines.append(
                f"| {fault} | {verdict} | {rows} | {rehearsal.seconds:.0f} | {named} | "
                f"{wrong or 'as it should be'} |"
            )
    print("\nRows: " + ", ".join(STAGES) + ".")
    print("| fault | verdict | rows of each stage | seconds | named first | the check is |")
    print("|---" * 6 + "|")
    print("\n".join(lines))
    return 0 if good else 1
