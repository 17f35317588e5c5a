"""Paired timings: every implementation once a round, the order turning, ratios within a round."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastattn import _extension
from fastattn.cli.bench.case import OURS, OURSELVES, Case, Checked, Run
from fastattn.cli.memory import peak_bytes

# Of the largest element of a result, and of 1.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9, torch.float16: 0.05, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Roofline:
    """What this machine does at best on the threads in use, measured."""

    flops: float  # float32 multiply-adds in registers, a second
    flops_bf16: float  # bfloat16's: of pairs where the processor has them
    bytes: float  # of a large copy, read and written, a second

    def seconds(self, case: Case) -> float:
        """The least time of ``case``; float64 does half the flops, float16 is computed in
        float32."""
        peaks = {torch.float64: self.flops / 2, torch.bfloat16: self.flops_bf16}
        return max(case.flops / peaks.get(case.dtype, self.flops), case.bytes / self.bytes)

    def best(self, other: Roofline) -> Roofline:
        return Roofline(
            max(self.flops, other.flops),
            max(self.flops_bf16, other.flops_bf16),
            max(self.bytes, other.bytes),
        )


def probe() -> Roofline:
    """The machine's roofline: the best of several short runs. Neighbours can spoil all of them:
    probe again between cases and keep the best."""
    flops = {torch.float32: 0.0, torch.bfloat16: 0.0}
    if _extension.HAS_NATIVE:
        for dtype in list(flops) * 6:
            like = torch.empty(1, dtype=dtype)
            start = time.perf_counter()
            done = torch.ops.fastattn.fma_probe(like, 400_000)
            flops[dtype] = max(flops[dtype], done / (time.perf_counter() - start))
    else:
        a = torch.randn(2048, 2048)
        flops[torch.float32] = max(2 * 2048**3 / seconds(lambda: [a @ a]) for _ in range(6))
    # On float32's units both are the same.
    flops[torch.bfloat16] = max(flops.values())
    source = torch.empty(16 << 20, dtype=torch.float32).fill_(1.0)
    target = torch.empty_like(source)
    moved = 2.0 * source.numel() * 4
    best = min(seconds(lambda: [target.copy_(source)]) for _ in range(4))
    return Roofline(flops[torch.float32], flops[torch.bfloat16], moved / best)


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Result:
    """One peer's row of a case: ours relative to it."""

    case: Case
    peer: str
    rounds: int
    ratio: float  # the peer's time over ours: the median of the rounds, and their quartiles
    low: float
    high: float
    seconds: float  # ours, the median of the rounds
    peer_seconds: float
    memory: int | None  # bytes, ours at its peak beyond what was there before
    peer_memory: int | None
    error: str = ""
    roofline: Roofline | None = None  # known when all cases are done

    @property
    def to_ourselves(self) -> bool:
        """Whether the peer is our own: the ratio is a cost then, and no speedup."""
        return self.peer.startswith(OURSELVES)

    @property
    def gflops(self) -> float:
        return self.case.flops / self.seconds / 1e9

    @property
    def percent(self) -> float:
        """Of the roofline, ours."""
        return 100 * self._least_seconds / self.seconds

    @property
    def peer_percent(self) -> float:
        return 100 * self._least_seconds / self.peer_seconds

    @property
    def _least_seconds(self) -> float:
        assert self.roofline is not None
        return self.roofline.seconds(self.case)

    @property
    def row(self) -> dict[str, object]:
        op, name, dtype, direction = self.case.key
        return {
            "op": op,
            "case": name,
            "dtype": dtype,
            "direction": direction,
            "peer": self.peer,
            "rounds": self.rounds,
            "ratio": f"{self.ratio:.3f}",
            "ratio_q1": f"{self.low:.3f}",
            "ratio_q3": f"{self.high:.3f}",
            "gflops": f"{self.gflops:.2f}",
            "percent_of_roofline": f"{self.percent:.1f}",
            "peer_percent_of_roofline": f"{self.peer_percent:.1f}",
            "peak_bytes": "" if self.memory is None else self.memory,
            "peer_peak_bytes": "" if self.peer_memory is None else self.peer_memory,
            "error": self.error,
        }


def measure(case: Case, budget: float, least: int | None = None, most: int = 200) -> list[Result]:
    """A Result for each implementation of ours and each peer, of ``least`` (by default the case's)
    to ``most`` rounds that take ``budget`` seconds. What gives wrong results is not timed;
    ``error`` then says how."""
    torch.compiler.reset()  # else its limit of recompilations leaves later cases to eager
    torch.manual_seed(0)
    runs = case.build()
    results = [_wrong(case, name, error) for name, error in _errors(case, runs).items()]
    for result in results:
        runs.pop(result.peer, None)
    ours = [name for name in runs if name.startswith(OURS)]
    if "" in (r.peer for r in results) or not ours or len(ours) == len(runs):
        return results
    start = time.perf_counter()
    memory = {name: _peak_bytes(run) for name, run in runs.items()}  # the warm-up as well
    once = time.perf_counter() - start
    if once < budget or not any(isinstance(run, Checked) for run in runs.values()):
        once = sum(seconds(run) for run in runs.values())  # without first uses and new memory
    rounds = max(least or case.least_rounds, min(most, int(budget / max(once, 1e-9))))
    times = _times(runs, rounds)
    peers = [name for name in runs if name not in ours]
    for mine, peer in itertools.product(ours, peers):
        variant = mine.removeprefix(OURS).strip()
        results.append(_result(replace(case, variant=variant), mine, peer, times, memory))
    return results


def _times(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(runs[name]))
    return times


def _result(
    case: Case,
    mine: str,
    peer: str,
    times: dict[str, list[float]],
    memory: dict[str, int | None],
) -> Result:
    ratios = [a / b for a, b in zip(times[peer], times[mine], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Result(
        case, peer, len(ratios), middle, low, high, statistics.median(times[mine]),
        statistics.median(times[peer]), memory[mine], memory[peer],
    )  # fmt: skip


def _wrong(case: Case, name: str, error: str) -> Result:
    nan = float("nan")
    return Result(case, name, 0, nan, nan, nan, nan, nan, None, None, error)


def _errors(case: Case, runs: dict[str, Run]) -> dict[str, str]:
    """What is wrong, by the implementation's name; by "" where it is the case as a whole."""
    checked = {name: run.error() for name, run in runs.items() if isinstance(run, Checked)}
    if not checked and not case.random:
        checked = {"": disagreement(case, runs)}
    return {name: error for name, error in checked.items() if error}


def disagreement(case: Case, runs: dict[str, Run]) -> str:
    """A coarse gate against a wrong kernel; the accuracy policy is the tests' business."""
    tolerance = TOLERANCE[case.dtype]
    ours = runs[OURS]()
    for name, run in runs.items():
        if name == OURS:
            continue
        for index, (a, b) in enumerate(zip(ours, run(), strict=True)):
            worst = relative_error(a, b)
            if not worst <= tolerance:
                return f"result {index} is off {name}'s by {worst:.2e} of its largest element"
    return ""


def relative_error(a: Tensor, b: Tensor) -> float:
    scale = 1 + b.abs().max()
    return float(((a - b).abs() / scale).max())


def _peak_bytes(run: Run) -> int | None:
    """``peak_bytes``; None where the run keeps its memory."""
    if isinstance(run, Checked) and run.keeps_memory:
        run()
        return None
    return peak_bytes(run)
