"""Our side of bench's cases under pytest-benchmark, for comparison over commits on one machine:

pytest benchmarks/test_regressions.py --benchmark-autosave --benchmark-compare
"""

from __future__ import annotations

import pytest

from fastattn.cli.bench.case import OURS
from fastattn.cli.bench.cases import cases
from fastattn.cli.main import OPS

CASES = list(cases(OPS, "default", grid=False))


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case.key))
def test_speed(benchmark, case):
    run = case.build()[OURS]
    run()
    benchmark.extra_info["gflop"] = case.flops / 1e9
    benchmark.pedantic(run, rounds=10)
