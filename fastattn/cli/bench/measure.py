"""Paired timings: every implementation once a round, the order turning, ratios within a round."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import _extension
from fastattn.cli.bench.case import OURS, Case, Run
from fastattn.cli.memory import peak_bytes


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


def measure(case: Case, budget: float, least: int = 5, most: int = 200) -> list[Result]:
    """One Result a peer, of ``least`` to ``most`` rounds that take ``budget`` seconds. A case whose
    results disagree is not timed; ``error`` then says how."""
    torch.compiler.reset()  # else its limit of recompilations leaves later cases to eager
    torch.manual_seed(0)
    runs = case.build()
    memory = {name: peak_bytes(run) for name, run in runs.items()}  # the warm-up as well
    if not case.random:
        error = _disagreement(case, runs)
        if error:
            nan = float("nan")
            return [Result(case, "", 0, nan, nan, nan, nan, nan, None, None, error)]
    once = sum(seconds(run) for run in runs.values())
    rounds = max(least, min(most, int(budget / max(once, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(runs[name]))
    ours = statistics.median(times[OURS])
    results = []
    for peer in names:
        if peer == OURS:
            continue
        ratios = [a / b for a, b in zip(times[peer], times[OURS], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results.append(
            Result(
                case,
                peer,
                rounds,
                middle,
                low,
                high,
                ours,
                statistics.median(times[peer]),
                memory[OURS],
                memory[peer],
            )
        )
    return results


def _disagreement(case: Case, runs: dict[str, Run]) -> str:
    """A coarse gate against a wrong kernel; the accuracy policy is the tests' business."""
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-9}.get(case.dtype, 0.05)
    ours = runs[OURS]()
    for name, run in runs.items():
        if name == OURS:
            continue
        for index, (a, b) in enumerate(zip(ours, run(), strict=True)):
            worst = _relative_error(a, b)
            if not worst <= tolerance:
                return f"result {index} is off {name}'s by {worst:.2e} of its largest element"
    return ""


def _relative_error(a: Tensor, b: Tensor) -> float:
    scale = 1 + b.abs().max()
    return float(((a - b).abs() / scale).max())
