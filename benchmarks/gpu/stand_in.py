"""Stands in for a GPU in a rehearsal: numpy's results with the noise of 16 bits, and faults.

``FASTATTN_REHEARSED_FAULT`` names a fault and where it is: ``hang:attention_backward128``.
"""

from __future__ import annotations

import os
import signal
import time

import numpy as np
from numpy.typing import NDArray

from gpu.cases import Case
from gpu.smoke import KERNELS
from gpu.smoke import Case as SmokeCase

FAULTS = ("hang", "crash", "sticky", "wrong", "missing", "peer")


class ContextLost(RuntimeError):
    """As after an illegal memory access: nothing on the GPU works any more in this process."""


def fault_at(place: str) -> str:
    fault, _, where = os.environ.get("FASTATTN_REHEARSED_FAULT", "").partition(":")
    return fault if where == place else ""


class Bench:
    def __init__(self) -> None:
        self._lost = False

    def environment(self) -> dict[str, object]:
        if fault_at("torch"):
            raise ImportError("libtorch_cuda.so: cannot open shared object file")
        missing = "_cuda.so: cannot open shared object file" if fault_at("library") else ""
        return {
            "gpu": "a stand-in",
            "capability": 80 if fault_at("machine") else 90,
            "versions": "rehearsal",
            "cuda": missing,
            "triton": "",
            "ceilings": {"copy GB/s": 3000.0, "matmul TFLOP/s": 700.0},
        }

    def prepare(self, implementation: str, cases: list[Case]) -> None:
        pass

    def smoke(self, kernel: str, case: SmokeCase) -> dict[str, tuple[NDArray, NDArray]]:
        self._launch(kernel)
        random = np.random.default_rng(0)
        results = {}
        for tensor in KERNELS[kernel].tensors:
            expected = random.standard_normal((150, 128))
            noise = 1 + random.uniform(-1, 1, expected.shape) * 2.0**-9 * (
                1.0 if case.dtype == "bfloat16" else 0.125
            )
            wrong = fault_at(kernel) == "wrong" and case.name != "one tile"
            results[tensor] = (np.zeros_like(expected) if wrong else expected * noise, expected)
        return results

    def measure(self, implementation: str, case: Case) -> list[dict[str, object]]:
        if fault_at(implementation) == "peer":
            os.kill(os.getpid(), signal.SIGKILL)
        for kernel in case.stands_on if implementation == "cuda" else ():
            self._launch(kernel)
        error = "1.0e-03" if implementation in ("cuda", "triton") else ""
        passes = {
            "Attention": ["backward" if getattr(case, "backward", False) else "forward"],
            "SecondOrder": ["tangent", "second derivative"],
            "Linear": ["forward", "dX", "dW"],
            "Step": ["step"],
        }[type(case).__name__]
        return [{"pass": p, "ms": 1.0, "TFLOP/s": case.flops / 1e9, "error": error} for p in passes]

    def profile(self, case: Case, what: str) -> None:
        print(f"profiled {case.name} {what}")

    def tune(self) -> list[dict[str, object]]:
        return [{"case": "a tile", "pass": "forward", "implementation": "choice 0", "ms": 1.0}]

    def lost(self, error: Exception) -> bool:
        return self._lost

    def _launch(self, kernel: str) -> None:
        fault = fault_at(kernel)
        if fault == "hang":
            time.sleep(3600)
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "sticky" or self._lost:
            self._lost = True
            raise ContextLost("CUDA error: an illegal memory access was encountered")
