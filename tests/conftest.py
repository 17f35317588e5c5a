"""What every test needs: the native library where it must be there, uninitialised memory that
hurts, seeds."""

from __future__ import annotations

import os

import pytest
import torch

from fastattn import _extension


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # `make test` sets the variable: there a missing library is a failure, elsewhere a reason to
    # skip.
    if _extension.HAS_NATIVE or os.environ.get("FASTATTN_TEST_REQUIRE_NATIVE") == "1":
        return
    for item in items:
        if "native" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=f"no native library: {_extension.why_not()}"))


@pytest.fixture(autouse=True)
def _poisoned_memory_and_seed():
    """torch.empty is filled with NaN, so that a kernel that leaves an element unwritten is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
