"""Implementations of one task side by side: quality, speed, memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sklearn.metrics import accuracy_score, f1_score, recall_score

T = TypeVar("T")
METRICS = ("accuracy", "recall", "f1")


@dataclass(frozen=True)
class Speed:
    """How many times faster than stock torch: the median of paired steps, and their quartiles."""

    median: float = 1.0
    low: float = 1.0
    high: float = 1.0

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


@dataclass
class Run:
    """One implementation of a task. The first of a task's runs is stock torch."""

    implementation: str
    metrics: dict[str, float] = field(default_factory=dict)  # on held-out data
    losses: list[float] = field(default_factory=list)
    speed: Speed = Speed()
    memory: int | None = None  # bytes that a step takes at its peak
    check: str = ""
    good: bool = True
    report: str = ""
    seconds: dict[str, float] = field(default_factory=dict)  # of a step, by kind of work

    def row(self, task: str, first: bool) -> tuple[str, ...]:
        return (
            task if first else "",
            self.implementation,
            *(f"{self.metrics[name]:.3f}" for name in METRICS),
            "1.00x" if first else str(self.speed),
            "" if self.memory is None else f"{self.memory / 2**20:,.1f}",
            self.check if self.good else f"{self.check}: FAILED",
        )


@dataclass
class Task:
    """A task and its runs, stock torch's first."""

    name: str
    runs: list[Run]
    about: str = ""  # a sentence for the page
    step: int = 1  # steps between two entries of a run's losses

    @property
    def good(self) -> bool:
        return all(run.good for run in self.runs)

    def rows(self) -> list[tuple[str, ...]]:
        return [run.row(self.name, run is self.runs[0]) for run in self.runs]


def metrics_of(truth: object, predicted: object) -> dict[str, float]:
    """Accuracy, and recall and F1 as means over the classes."""
    average = {"average": "macro", "zero_division": 0}
    return {
        "accuracy": accuracy_score(truth, predicted),
        "recall": recall_score(truth, predicted, **average),
        "f1": f1_score(truth, predicted, **average),
    }


def tolerance(accuracy: float, count: int) -> float:
    """Two standard errors of the difference between two accuracies on ``count`` examples each:
    dropout draws other elements in each implementation, and two runs of the same one differ so."""
    return 2.0 * math.sqrt(2.0 * accuracy * (1.0 - accuracy) / count)


def side_by_side(
    steps: Sequence[Callable[[T], object]], inputs: Iterable[T], skip: int = 1
) -> list[Speed]:
    """The speed of each step function, beside the first one's. All take turns on every input, and
    each begins as often as another, so that a machine that slows down slows all of them. The
    ratios of the first ``skip`` inputs do not count."""
    ratios: list[list[float]] = [[] for _ in steps]
    for number, given in enumerate(inputs):
        seconds = [0.0] * len(steps)
        for turn in range(len(steps)):
            which = (number + turn) % len(steps)
            start = time.perf_counter()
            steps[which](given)
            seconds[which] = time.perf_counter() - start
        if number >= skip:
            for found, own in zip(ratios, seconds, strict=True):
                found.append(seconds[0] / own)
    return [speed_of(found) for found in ratios]


def speed_of(ratios: Sequence[float]) -> Speed:
    if len(ratios) < 2:
        return Speed(*ratios, *ratios, *ratios)
    low, median, high = statistics.quantiles(ratios, n=4)
    return Speed(median, low, high)
