"""Tells gpu_check.py what a run of pytest does, test by test: ``-p gpu.pytest_plugin``.

FASTATTN_CHECK_SHARD=i/n keeps every n-th test; FASTATTN_CHECK_AFTER=ID leaves out the tests up to
this one, which lost the GPU's context or hung. A test after which the context is lost ends the
run with exit status 3: every later test would fail because of it.
"""

from __future__ import annotations

import json
import os

import pytest

from gpu import context

LOST = 3
# A copy of stdout, which pytest captures later.
_out = os.fdopen(os.dup(1), "w", buffering=1)
_lost_by_text = False


def _tell(kind: str, **facts: object) -> None:
    # pytest may be in the middle of a line of dots.
    _out.write("\n@" + json.dumps({"kind": kind, **facts}) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    shard, shards = map(int, os.environ.get("FASTATTN_CHECK_SHARD", "0/1").split("/"))
    items[:] = items[shard::shards]
    after = os.environ.get("FASTATTN_CHECK_AFTER")
    ids = [item.nodeid for item in items]
    if after in ids:
        items[:] = items[ids.index(after) + 1 :]
    _tell("collected", count=len(items))


def pytest_runtest_logstart(nodeid: str) -> None:
    _tell("begin", what=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _lost_by_text
    if report.when != "call" and report.passed:
        return
    lines = report.longreprtext.strip().splitlines() or [""]
    if report.failed:
        _lost_by_text |= "CUDA error" in report.longreprtext
    _tell("test", what=report.nodeid, outcome=report.outcome, error=lines[-1][:300])


def pytest_runtest_logfinish(nodeid: str) -> None:
    if _lost_by_text or context.is_lost():
        _tell("lost", what=nodeid)
        pytest.exit(f"the GPU's context was lost by {nodeid}", returncode=LOST)
