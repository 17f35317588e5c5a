"""The GPU that torch sees."""

from __future__ import annotations

import contextlib
import platform
import subprocess

import torch
from numpy.typing import NDArray

import fastattn
from fastattn import _extension, backends
from fastattn.ops import triton
from gpu import context
from gpu.cases import Case
from gpu.clock import Clock
from gpu.results import Results
from gpu.smoke import Case as SmokeCase
from gpu.timings import Timings


class Bench:
    """``device`` and ``names`` of backends, so that this file runs on a CPU as well: there each of
    ours is the cpu backend."""

    def __init__(self, device: str = "cuda", names: dict[str, str] | None = None) -> None:
        self.device = torch.device(device)
        self.clock = Clock(self.device)
        self.timings = Timings(self.clock, names or {"cuda": "cuda", "triton": "triton"})

    def environment(self) -> dict[str, object]:
        if self.clock.on_gpu and not torch.cuda.is_available():
            return {"refused": f"torch sees no GPU (torch {torch.__version__})"}
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
            return {"refused": f"torch 2.11 or later is needed, this is {torch.__version__}"}
        facts: dict[str, object] = {
            "versions": f"torch {torch.__version__}, triton {_triton_version()}, "
            f"Python {platform.python_version()}, fastattn {fastattn.__version__}",
            "cuda": _extension.cuda_load_failure() or "",
            "triton": triton.load_failure() or "",
            "backends": backends.available(),
            "ceilings": self.clock.ceilings(),
        }
        if self.clock.on_gpu:
            major, minor = torch.cuda.get_device_capability()
            facts["gpu"] = torch.cuda.get_device_name()
            facts["capability"] = 10 * major + minor
            query = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
            facts["state"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        return facts

    def lost(self, error: Exception) -> bool:
        return context.is_lost()

    def prepare(self, implementation: str, cases: list[Case]) -> None:
        """Makes the context, with a product in float64, as references have. Triton compiles its
        kernels on short problems of the same kind; what fails here fails again, and is told, when
        it is timed."""
        x = torch.ones(64, 64, device=self.device, dtype=torch.float64)
        (x @ x).sum().item()
        for case in cases if implementation == "triton" else ():
            short = {"batch": 1, "seq": 512} if hasattr(case, "seq") else {"rows": 128}
            with contextlib.suppress(Exception):
                self.timings.measure(implementation, case._replace(**short))

    def smoke(self, kernel: str, case: SmokeCase) -> dict[str, tuple[NDArray, NDArray]]:
        return Results(self.device).of(kernel, case)

    def measure(self, implementation: str, case: Case) -> list[dict[str, object]]:
        return self.timings.measure(implementation, case)

    def profile(self, case: Case, what: str) -> None:
        self.timings.profile(case, what)

    def tune(self) -> list[dict[str, object]]:
        from gpu.tune import forward64

        return forward64(self)


def _triton_version() -> str:
    try:
        import triton as package
    except ImportError:
        return "not installed"
    return package.__version__


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "?"
    return done.stdout.strip()
