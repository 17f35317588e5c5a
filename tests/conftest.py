"""What every test needs: the native library where it must be there, uninitialised memory that
hurts, seeds."""

from __future__ import annotations

import os

import pytest
import torch

# The tests are a check of their own; a kernel's check at its first use would be kept beyond them.
os.environ.setdefault("FASTATTN_SELF_CHECK", "0")

from fastattn import _extension, _products
from fastattn.functional import _served

# The files that take longest, whose single tests take up to minutes.
LONG = (
    "tests/ops/test_isa.py",
    "tests/cuda/test_nvcc.py",
    "tests/test_packaging.py",
    "tests/ops/triton/test_compile.py",
    "tests/cuda/test_emulator.py",
)


def _place(path: str) -> int:
    return next((n for n, name in enumerate(LONG) if path.endswith(name)), len(LONG))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The long tests start first, so that the workers of pytest-xdist end with short ones.
    items.sort(key=lambda item: _place(item.path.as_posix()))
    # `make test` sets the variable: there a missing library is a failure, elsewhere a reason to
    # skip.
    if _extension.HAS_NATIVE or os.environ.get("FASTATTN_TEST_REQUIRE_NATIVE") == "1":
        return
    for item in items:
        if "native" in item.keywords:
            item.add_marker(
                pytest.mark.skip(reason=f"no native library: {_extension.load_failure()}")
            )


def pytest_terminal_summary(terminalreporter) -> None:
    """What each CUDA kernel does without each of its synchronisations (test_emulator.py)."""
    reports = [r for key in ("passed", "failed") for r in terminalreporter.stats.get(key, [])]
    mutants = sorted(
        value for r in reports for name, value in r.user_properties if name == "mutant"
    )
    if not mutants:
        return
    terminalreporter.section("CUDA kernels without one of their waits, fences and barriers")
    for kernel, statement, seen in mutants:
        terminalreporter.write_line(f"{kernel:19} {statement[:58]:58} {seen[:60]}")


@pytest.fixture(autouse=True)
def _small_problems_run_the_kernels(request, monkeypatch):
    """Tests use small models; on a CPU these would run torch's own code, which is faster."""
    monkeypatch.setattr(_served, "LEAST_WORK", 0)
    monkeypatch.setattr(_served, "LEAST_ATTENTION", 0)
    for name in ("LEAST_NORM", "LEAST_RMS_NORM", "LEAST_LAYER_NORM"):
        monkeypatch.setattr(_served, name, 0)
    if request.module.__name__.startswith("test_compiler"):
        monkeypatch.setattr(_served, "LEAST_DROPOUT", 0)  # elsewhere small dropouts draw as torch's
    monkeypatch.setattr(_served, "LEAST_ACTIVATION", dict.fromkeys(_served.LEAST_ACTIVATION, 0))
    monkeypatch.setattr(_products, "_INTEL", False)  # whose torch has the faster products
    monkeypatch.setattr(_products, "_ZEN5", False)
    monkeypatch.setattr(_products, "epilogue_wins", lambda *given: True)


@pytest.fixture(autouse=True)
def _poisoned_memory_and_seed():
    """torch.empty is filled with NaN, so that a kernel that leaves an element unwritten is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
