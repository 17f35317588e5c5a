"""What a check runs, in which order, and for how long at most. Free of torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "benchmarks/gpu/worker.py"

# Stage -> seconds at most. What a stage leaves over, later ones have.
BOXES = {
    "environment": 120.0,
    "smoke": 75.0,
    "speed": 75.0,
    "profile": 75.0,
    "Hopper tests": 80.0,
    "Triton tests": 110.0,
    "Triton speed": 80.0,
    "tune": 30.0,
    "sanitizer": 50.0,
}
# (implementation, families of cases), each in a process of its own; ours come first.
_ATTENTION = ("attention forward", "attention backward")
SPEED = [
    ("cuda", _ATTENTION[:1]),
    ("cuda", _ATTENTION[1:]),
    ("cuda", ("linear",)),
    ("cuda", ("step",)),
    ("cudnn", _ATTENTION),
    ("flash", _ATTENTION),
    ("efficient", _ATTENTION),
    ("eager", ("linear", "step")),
]
TRITON_SPEED = [
    ("triton", _ATTENTION[:1]),
    ("triton", _ATTENTION[1:]),
    ("triton", ("masks",)),
    ("triton", ("float32",)),
    ("triton", ("second order",)),
    ("triton", ("linear", "step")),
    ("efficient", ("masks", "float32")),
]
NCU = (
    "--clock-control", "none", "-s", "2", "-c", "1", "--page", "details",
    *(
        word
        for section in (
            "SpeedOfLight", "ComputeWorkloadAnalysis", "SchedulerStats", "WarpStateStats",
            "MemoryWorkloadAnalysis", "LaunchStats",
        )
        for word in ("--section", section)
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """``bench`` is hardware, or stand_in for a rehearsal."""

    bench: str
    environment: dict[str, str]
    boxes: dict[str, float] = field(default_factory=lambda: dict(BOXES))
    # Seconds for a start (imports from a cold disk, a context), a case of the smoke stage, an
    # implementation's timings, a profile, a test, a build.
    start_clock: float = 45.0
    smoke_clock: float = 12.0
    speed_clock: float = 25.0
    profile_clock: float = 20.0
    test_clock: float = 45.0  # of a test, from its beginning
    triton_test_clock: float = 90.0  # which compiles
    build_clock: float = 120.0
    profiler: tuple[str, ...] | None = None  # None: not there
    sanitizer: tuple[str, ...] | None = None
    hopper_tests: tuple[str, ...] = ()
    triton_tests: tuple[str, ...] = ()
    shards: int = 6
    compile_ahead: tuple[str, ...] = ()  # on the CPU, beside the profiles
    build: tuple[str, ...] = ()  # of the libraries, where those that were brought do not load
    gpu_processes: Callable[[], set[int]] = set
    triton_only: bool = False

    def worker(self, *job: str) -> list[str]:
        return [sys.executable, str(WORKER), self.bench, *job]


def plan_of_hardware(libraries: Path | None, triton_only: bool = False) -> Plan:
    """For the GPU of this machine, with the libraries of a bundle or the package's own."""
    environment = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        # The tests need no plugin but the check's own.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        # Deterministic products need it in older releases of torch.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # The check itself is what the first use of a kernel would check.
        "FASTATTN_SELF_CHECK": "0",
    }
    if libraries is not None:
        environment["FASTATTN_LIBRARIES"] = str(libraries)
    tests = ROOT / "tests"
    return Plan(
        "hardware",
        environment,
        profiler=_program("ncu", *NCU),
        sanitizer=_program("compute-sanitizer", "--error-exitcode", "9", "--tool"),
        hopper_tests=(str(tests / "cuda/test_hopper.py"),),
        triton_tests=(str(tests / "ops/triton/test_gpu.py"), "-m", "first_on_gpu"),
        shards=max(1, min(8, (os.cpu_count() or 2) // 2)),
        compile_ahead=(sys.executable, str(tests / "ops/triton/compile_only.py"), "--jobs", "8"),
        build=(sys.executable, str(ROOT / "benchmarks/gpu_bundle.py"), "--restricted", "--output"),
        gpu_processes=_processes_of_nvidia_smi,
        triton_only=triton_only,
    )


def _program(name: str, *options: str) -> tuple[str, ...] | None:
    paths = [os.environ.get("PATH", ""), *(
        f"{home}/bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home
    )]  # fmt: skip
    found = shutil.which(name, path=os.pathsep.join(paths))
    return None if found is None else (found, *options)


def _processes_of_nvidia_smi() -> set[int]:
    command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return {int(word) for word in done.stdout.split() if word.isdigit()}
