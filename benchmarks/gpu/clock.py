"""Times what runs on a device: on a GPU by events, with the launches queued ahead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

L2_BYTES = 64 << 20
TIMINGS = 20


class Clock:
    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"

    def sets(self, set_bytes: int, most: int = 8) -> int:
        """How many sets of inputs together outgrow L2."""
        return max(1, min(most, 2 * L2_BYTES // set_bytes + 1)) if self.on_gpu else 1

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def wall_ms(self, step: Callable[[], object]) -> float:
        """The median time of a step as the user sees it, with launches and Python."""

        def steps(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                step()
            self.synchronize()
            return (time.perf_counter() - start) / count * 1e3

        steps(20 if self.on_gpu else 1)
        return statistics.median(steps(50 if self.on_gpu else 1) for _ in range(TIMINGS))

    def median_ms(self, run: Callable[[int], object], sets: int) -> float:
        """The median of TIMINGS runs by events, after a warm-up; run(n) uses the n-th inputs.

        The GPU sleeps first, so that the CPU has queued the launches when the timing begins.
        """
        if not self.on_gpu:
            start = time.perf_counter()
            run(0)
            return (time.perf_counter() - start) * 1e3
        for n in range(3):
            run(n % sets)
        torch.cuda.synchronize()
        events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(TIMINGS)]
        torch.cuda._sleep(60_000_000)
        for n, (start, stop) in enumerate(events):
            start.record()
            run(n % sets)
            stop.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in events)

    def ceilings(self) -> dict[str, float]:
        """What a copy and a product of random matrices reach."""
        count, size = (1 << 28, 8192) if self.on_gpu else (1 << 20, 256)
        source = torch.randn(count, device=self.device)
        target = torch.empty_like(source)
        copied = self.median_ms(lambda _: target.copy_(source), 1)
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in "ab")
        multiplied = self.median_ms(lambda _: a @ b, 1)
        return {
            "copy GB/s": 8 * count / copied / 1e6,
            "matmul TFLOP/s": 2 * size**3 / multiplied / 1e9,
        }
