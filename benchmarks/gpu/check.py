"""Runs a plan: every stage in its box, every program under its own clock, every row kept.

A stage that fails, hangs or is cut off leaves a finding that names what did it, and the next
stage begins. What a kernel failed in the smoke stage, later stages leave out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gpu.cases import FAMILIES, PROFILES
from gpu.evidence import Evidence
from gpu.plan import ROOT, SPEED, TRITON_SPEED, Plan
from gpu.processes import Child, fact_of, watch
from gpu.smoke import KERNELS, cases_of
from gpu.tests import Tests

LEAST_SECONDS = 5.0  # a stage with less is not begun


class Check:
    def __init__(self, plan: Plan, evidence: Evidence, seconds: float) -> None:
        self.plan, self.evidence = plan, evidence
        self.stop = time.monotonic() + seconds
        self.facts: dict = {}
        self.spent: dict[str, float] = {}  # of the stages that were begun
        self.failed: set[str] = set()  # kernels that were wrong, hung or crashed
        self.broken: set[str] = set()  # of these, those that hung or crashed
        self._bad_case: dict[str, str] = {}  # of each of them, where it was seen
        self._environment = dict(plan.environment)
        self._children: list[Child] = []
        self._gpu_hangs = False

    # --- what may be asked before anything is written

    def refused(self) -> str | None:
        """Why this machine cannot be checked, or None; leaves ``facts``."""
        start = time.monotonic()
        box = self.plan.boxes["environment"]
        for _ in range(2):  # the first start may be slow, from a cold disk
            child = self._child("environment", self.plan.worker("environment"), box)
            watch([child], start + 2 * box, lambda *_: None)
            if child.status == "ok":
                break
        self.spent["environment"] = time.monotonic() - start
        told = [fact for line in child.lines if (fact := fact_of(line))]
        if child.status != "ok" or not told:
            log = " ".join(child.log[-1:])[:300]
            return f"torch and fastattn do not start ({child.status}): {log}"
        self.facts = told[-1]
        if why := self.facts.get("refused"):
            return str(why)
        capability = self.facts["capability"]
        if capability != 90 and not self.plan.triton_only:
            return (
                f"compute capability {capability / 10:.1f} is not 9.0, which the CUDA kernels are "
                "for; --triton-only checks the Triton kernels on other GPUs"
            )
        return None

    # --- the stages

    def run(self) -> bool:
        """Whether all is green."""
        try:
            if self.plan.triton_only:
                self._triton_stages()
            elif not self.facts["cuda"]:
                self._cuda_stages(("smoke", "speed"))
                ahead = self._compile_ahead()
                self._cuda_stages(("profile", "Hopper tests"))
                self._at_end_of(ahead)
                self._triton_stages()
                self._cuda_stages(("tune", "sanitizer"))
            else:
                self._without_libraries()
        finally:
            for child in self._children:
                if child.status == "":
                    child.kill("the check ended")
        return not self.evidence.red

    def _compile_ahead(self) -> Child | None:
        """Fills Triton's cache for its tests; without it they compile for themselves."""
        if not self.plan.compile_ahead or self.facts["triton"]:
            return None
        return self._child("compile ahead", list(self.plan.compile_ahead), 90.0)

    def _at_end_of(self, ahead: Child | None) -> None:
        if ahead is None:
            return
        watch([ahead], min(self.stop, ahead.ends), lambda *_: None)
        if ahead.status != "ok":
            log = " ".join(ahead.log[-3:])[:200]
            self.evidence.found("Triton tests", "compile_only.py", f"{ahead.status}: {log}", False)

    def _without_libraries(self) -> None:
        """A build begins, Triton has the time until it is done."""
        why = self.facts["cuda"]
        with tempfile.TemporaryDirectory() as folder:
            libraries = Path(folder) / "libraries"
            command = [*self.plan.build, str(libraries)]
            build = self._child("build", command, self.plan.build_clock)
            self._triton_stages()
            watch([build], min(self.stop, build.ends), lambda *_: None)
            if build.status == "ok":
                self._environment["FASTATTN_LIBRARIES"] = str(libraries)
                self.refused()  # the facts again, of these libraries
            if build.status != "ok" or self.facts["cuda"]:
                log = " ".join(build.log[-3:])[:300]
                self.evidence.found("environment", "_cuda.so", f"does not load: {why}")
                self.evidence.found(
                    "environment", "build on this machine", f"{build.status}: {log}"
                )
                return
            self.evidence.found(
                "environment", "_cuda.so", f"was built here, as the one that came does not load: "
                f"{why}", red=False,
            )  # fmt: skip
            self._cuda_stages(("smoke", "speed", "profile", "Hopper tests", "tune", "sanitizer"))

    def _cuda_stages(self, names: tuple[str, ...]) -> None:
        bodies: dict[str, Callable[[float], None]] = {
            "smoke": self._smoke,
            "speed": lambda stop: self._speed("speed", SPEED, stop),
            "profile": self._profile,
            "Hopper tests": self._hopper_tests,
            "tune": self._tune,
            "sanitizer": self._sanitize,
        }
        for name in names:
            self._stage(name, bodies[name])

    def _triton_stages(self) -> None:
        if why := self.facts["triton"]:
            self.evidence.found("environment", "Triton", str(why))
            return
        self._stage(
            "Triton tests",
            lambda stop: self._tests(
                "Triton tests", self.plan.triton_tests, self.plan.triton_test_clock, stop
            ),
        )
        self._stage("Triton speed", lambda stop: self._speed("Triton speed", TRITON_SPEED, stop))

    def _stage(self, name: str, body: Callable[[float], None]) -> None:
        start = time.monotonic()
        left = self.stop - start
        if self._gpu_hangs:
            self.evidence.found(name, "the stage", "not begun: the GPU does not come free")
            return
        if left < LEAST_SECONDS:
            informative = name in ("profile", "tune", "sanitizer")
            self.evidence.found(name, "the stage", "not begun: no time left", not informative)
            return
        body(start + min(left, self.plan.boxes[name]))
        self.spent[name] = time.monotonic() - start
        print(f"{name}: {self.spent[name]:.0f} s, "
              f"{len(self.evidence.of_stage(name))} rows", flush=True)  # fmt: skip

    def _smoke(self, stop: float) -> None:
        """All kernels at once, each in its own process."""
        begun: dict[str, str] = {}

        def on_line(child: Child, line: str) -> None:
            fact = fact_of(line) or {}
            if fact.get("kind") == "begin":
                begun[child.name] = fact["what"]
                child.seconds = self.plan.smoke_clock
                child.restart_clock()
            elif fact.pop("kind", "") == "row":
                self.evidence.row("smoke.csv", "smoke", kernel=child.name, **fact)

        children = [
            self._child(name, self.plan.worker("smoke", name), self.plan.start_clock)
            for name in KERNELS
        ]
        watch(children, stop, on_line)
        broken = []
        for child in children:
            rows = [row for row in self.evidence.of_stage("smoke") if row["kernel"] == child.name]
            bad = [row for row in rows if row["result"] != "ok"]
            for row in bad:
                where = " ".join(filter(None, (row["case"], row["tensor"])))
                self.evidence.found(
                    "smoke", child.name, f"{row['result']} in {where}: error {row['error']}"
                )
                self._bad_case.setdefault(child.name, row["case"])
            if child.status not in ("ok", "exit status 1") or (child.status != "ok" and not bad):
                last = begun.get(child.name, "its start")
                self.evidence.found("smoke", child.name, f"{child.status}, in {last}")
                self._bad_case[child.name] = begun.get(child.name, "")
                broken.append(child)
            elif not rows:
                self.evidence.found("smoke", child.name, "gave no result")
            else:
                if not bad:
                    continue
            self.failed.add(child.name)
        self.broken = {child.name for child in broken}
        self._free_gpu(broken)
        self._under_watchdog([child.name for child in broken], stop)

    def _under_watchdog(self, kernels: list[str], stop: float) -> None:
        """Once more what hung or crashed, in the build whose waits name themselves."""
        folder = self._environment.get("FASTATTN_LIBRARIES", str(ROOT / "fastattn"))
        if self.plan.bench == "hardware" and not (Path(folder) / "_cuda_watchdog.so").exists():
            return
        for name in kernels:
            seconds = min(self.plan.start_clock, stop - time.monotonic())
            if seconds < LEAST_SECONDS or self._gpu_hangs:
                return
            child = self._child(
                f"{name} under watchdog", self._smoke_again(name), seconds,
                FASTATTN_CUDA_VARIANT="watchdog",
            )  # fmt: skip
            watch([child], stop, lambda *_: None)
            for line in [line for line in child.lines if "watchdog:" in line][:3]:
                self.evidence.found("smoke", name, line)
            self._free_gpu([child] if child.status != "ok" else [])

    def _smoke_again(self, kernel: str) -> list[str]:
        """The case in which the kernel failed, or its first."""
        case = self._bad_case.get(kernel) or cases_of(kernel)[0].name
        return self.plan.worker("smoke", kernel, "--only", case)

    def _speed(self, stage: str, jobs: list[tuple[str, tuple[str, ...]]], stop: float) -> None:
        """All processes start at once and get ready; then one after the other has the GPU."""
        ceiling = float(self.facts.get("ceilings", {}).get("matmul TFLOP/s", 0.0))
        begun: dict[str, str] = {}

        def on_line(child: Child, line: str) -> None:
            fact = fact_of(line) or {}
            kind = fact.pop("kind", "")
            if kind == "ready":
                ready.add(child.name)
            elif kind == "begin":
                begun[child.name] = fact["what"]
            elif kind == "failed":
                self._failed_case(stage, child.name, fact["what"], fact["error"])
            elif kind == "row":
                if ceiling and fact.get("TFLOP/s"):
                    fact["% of matmul"] = f"{100 * float(fact['TFLOP/s']) / ceiling:.0f}"
                self.evidence.row("speed.csv", stage, **fact)

        ready: set[str] = set()
        children = []
        for implementation, families in jobs:
            command = self.plan.worker("speed", implementation, *families)
            command += ["--failed", ",".join(sorted(self.failed))]
            name = f"{implementation}, {' and '.join(families)}"
            children.append(self._child(name, command, stop - time.monotonic()))
        # None is timed while another one compiles.
        patience = stop - 0.4 * (stop - time.monotonic())
        watch(children, patience, on_line, kill=False,
              until=lambda: all(c.status or c.name in ready for c in children))  # fmt: skip
        for child in children:
            if child.status == "":
                child.seconds = self.plan.speed_clock
                child.restart_clock()
                child.say("go")
                watch([child], stop, on_line)
            if child.status != "ok":
                last = begun.get(child.name, "its start")
                self.evidence.found(stage, child.name, f"{child.status}, in {last}")
                self._leave_out(child.name, last)
                self._free_gpu([child])

    def _leave_out(self, name: str, case: str) -> None:
        """What the CUDA library failed in a timing, later stages leave out."""
        if name.startswith("cuda,"):
            for timed in (c for cases in FAMILIES.values() for c in cases if c.name == case):
                self.failed.update(timed.stands_on)

    def _failed_case(self, stage: str, name: str, case: str, error: str) -> None:
        """Ours must serve its cases; a peer may not know a mask or a dtype."""
        ours = name.startswith(("cuda,", "triton,"))
        implementation = name.split(",")[0]
        self.evidence.row("speed.csv", stage, case=case, implementation=implementation, note=error)
        self.evidence.found(stage, implementation, f"{case}: {error}", red=ours)
        self._leave_out(name, case)

    def _profile(self, stop: float) -> None:
        if self.plan.profiler is None:
            self.evidence.found("profile", "ncu", "is not on this machine", red=False)
            return
        for name, (kernel, _, _) in PROFILES.items():
            if name in self.failed:
                continue
            command = [*self.plan.profiler, "-k", f"regex:{kernel}"]
            command += self.plan.worker("profile", name)
            self._informative("profile", name, command, self.plan.profile_clock, stop, "ncu.txt")

    def _sanitize(self, stop: float) -> None:
        """memcheck of what failed; else the race checks of the kernel with most barriers."""
        if self.plan.sanitizer is None:
            self.evidence.found("sanitizer", "compute-sanitizer", "is not there", red=False)
            return
        runs = [("memcheck", kernel) for kernel in sorted(self.failed)]
        for tool, kernel in runs or [("racecheck", "attention_backward64")]:
            command = [*self.plan.sanitizer, tool, *self._smoke_again(kernel)]
            seconds = stop - time.monotonic()
            name = f"{tool} of {kernel}"
            self._informative("sanitizer", name, command, seconds, stop, "sanitizer.txt")

    def _informative(
        self, stage: str, name: str, command: list[str], seconds: float, stop: float, file: str
    ) -> None:
        """A tool's report into a file; its failure is noted and never red."""
        if stop - time.monotonic() < LEAST_SECONDS:
            self.evidence.found(stage, name, "not begun: no time left", red=False)
            return
        child = self._child(name, command, seconds)
        watch([child], stop, lambda *_: None)
        self.evidence.text(file, "\n".join([f"=== {name}: {child.status}", *child.lines, ""]))
        self.evidence.row("speed.csv", stage, case=name, implementation=stage, note=child.status)
        verdict = [line for line in child.lines if "ERROR SUMMARY" in line]
        if child.status != "ok" or verdict:
            told = " ".join([child.status, *verdict])
            self.evidence.found(stage, name, told, red=False)
        if child.status != "ok":
            self._free_gpu([child])

    def _tune(self, stop: float) -> None:
        child = self._child(
            "tune", self.plan.worker("tune"), self.plan.speed_clock, FASTATTN_CUDA_VARIANT="tune"
        )

        def on_line(_: Child, line: str) -> None:
            fact = fact_of(line) or {}
            if fact.pop("kind", "") == "row":
                self.evidence.row("speed.csv", "tune", **fact)

        watch([child], stop, on_line)
        if child.status != "ok":
            log = " ".join(child.log[-3:])[:200]
            self.evidence.found("tune", "tiles of D = 64", f"{child.status}: {log}", red=False)
            self._free_gpu([child])

    def _tests(self, stage: str, selection: tuple[str, ...], clock: float, stop: float) -> None:
        tests = Tests(stage, selection, self.plan, clock, self.evidence, self._child)
        self._free_gpu(tests.run(stop))

    def _hopper_tests(self, stop: float) -> None:
        """Without those of a kernel that hung or crashed: each would do so again."""
        dead = {KERNELS[name].op == "attention" for name in self.broken}
        if len(dead) == 2:
            self.evidence.found("Hopper tests", "all tests", "left out: kernels hang or crash")
            return
        layers = "linear or mlp or layers"
        chosen = () if not dead else ("-k", layers if True in dead else f"not ({layers})")
        if chosen:
            self.evidence.found(
                "Hopper tests", "a part of the tests", f"left out ({' '.join(chosen)} are run), "
                f"as {', '.join(sorted(self.broken))} hung or crashed",
            )  # fmt: skip
        selection = (*self.plan.hopper_tests, *chosen)
        self._tests("Hopper tests", selection, self.plan.test_clock, stop)

    # --- processes

    def _child(self, name: str, command: list[str], seconds: float, **variables: str) -> Child:
        child = Child(name, command, self._environment | variables, ROOT, seconds)
        self._children.append(child)
        return child

    def _free_gpu(self, ended: list[Child]) -> None:
        """Waits until killed processes have left the GPU; a kernel that hangs can keep it."""
        pids = {child.pid for child in ended}
        if not pids:
            return
        until = time.monotonic() + 10.0
        while pids & self.plan.gpu_processes():
            if time.monotonic() > until:
                self._gpu_hangs = True
                names = ", ".join(child.name for child in ended)
                self.evidence.found("GPU", names, "killed, but still on the GPU after 10 s")
                return
            time.sleep(0.5)
