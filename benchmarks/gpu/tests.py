"""A stage of tests: pytest in shards, each started again behind the test that ended it."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from gpu.evidence import Evidence
from gpu.plan import Plan
from gpu.processes import CUT_OFF, Child, fact_of, watch
from gpu.pytest_plugin import LOST

MOST_RESTARTS = 10  # of a shard


@dataclass
class Shard:
    number: int
    child: Child | None = None
    running: str = ""  # the test
    collected: int | None = None
    done: set[str] = field(default_factory=set)
    restarts: int = 0


class Tests:
    def __init__(
        self,
        stage: str,
        selection: tuple[str, ...],
        plan: Plan,
        clock: float,
        evidence: Evidence,
        start: Callable[..., Child],
    ) -> None:
        self.stage, self.selection, self.plan, self.evidence = stage, selection, plan, evidence
        self._clock, self._start = clock, start
        self.outcomes: Counter[str] = Counter()
        self._shards: dict[Child, Shard] = {}  # of the processes that run
        self._ended: list[Child] = []  # by force

    def run(self, stop: float) -> list[Child]:
        """Runs all shards until ``stop``; returns the processes that were killed or crashed."""
        shards = [Shard(n) for n in range(self.plan.shards)]
        for shard in shards:
            self._begin(shard, after="")
        while live := [shard.child for shard in shards if shard.child is not None]:
            watch(live, stop, self._on_line, until=lambda: any(c.status for c in self._shards))
            for child in live:
                if child.status:
                    self._at_end(self._shards.pop(child), child, stop)
        self._count(shards)
        return self._ended

    def _begin(self, shard: Shard, after: str) -> None:
        command = [
            sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "gpu.pytest_plugin",
            "-p", "no:cacheprovider", "--tb=short", *self.selection,
        ]  # fmt: skip
        shard.running = ""
        shard.child = self._start(
            f"shard {shard.number}", command, self._clock,
            FASTATTN_CHECK_SHARD=f"{shard.number}/{self.plan.shards}", FASTATTN_CHECK_AFTER=after,
        )  # fmt: skip
        self._shards[shard.child] = shard

    def _on_line(self, child: Child, line: str) -> None:
        child.restart_clock()
        shard = self._shards[child]
        if (fact := fact_of(line)) is None:
            return
        if fact["kind"] == "collected" and shard.collected is None:
            shard.collected = fact["count"]
        elif fact["kind"] == "begin":
            shard.running = fact["what"]
        elif fact["kind"] == "test":
            self._outcome(shard, fact["what"], fact["outcome"], fact["error"])

    def _outcome(self, shard: Shard, test: str, outcome: str, error: str = "") -> None:
        if test in shard.done and outcome != "failed":
            return
        shard.done.add(test)
        self.outcomes[outcome] += 1
        if outcome == "failed":
            self.evidence.found(self.stage, test, error)

    def _at_end(self, shard: Shard, child: Child, stop: float) -> None:
        """Keeps the log, and goes on behind a test that took its process with it."""
        shard.child = None
        head = f"=== {self.stage}, shard {shard.number}: {child.status}"
        self.evidence.text("tests.txt", "\n".join([head, *child.log, ""]))
        if child.returncode in (0, 1, 5) or not shard.running:
            if child.returncode not in (0, 1, 5):
                self.evidence.found(self.stage, f"shard {shard.number}", child.status)
            return
        if child.status.startswith(CUT_OFF):
            return  # neither this test nor a later one is reached
        if child.returncode != LOST:  # else the test has told its outcome
            self._outcome(shard, shard.running, "failed", child.status)
            self._ended.append(child)
        shard.restarts += 1
        if time.monotonic() < stop and shard.restarts <= MOST_RESTARTS:
            self._begin(shard, after=shard.running)

    def _count(self, shards: list[Shard]) -> None:
        ran = self.outcomes["passed"] + self.outcomes["failed"]
        missing = sum((s.collected or 0) - len(s.done) for s in shards)
        if ran == 0:
            skipped = self.outcomes["skipped"]
            self.evidence.found(self.stage, "all tests", f"none ran, {skipped} were skipped")
        if missing > 0:
            self.evidence.found(self.stage, f"{missing} tests", "not reached in the stage's time")
        self.evidence.row(
            "speed.csv", self.stage, case=self.stage, implementation="pytest",
            note=", ".join(f"{n} {outcome}" for outcome, n in sorted(self.outcomes.items())),
        )  # fmt: skip
