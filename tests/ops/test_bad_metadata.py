"""The native ops, called directly with bad arguments: an exception or results of the right shapes,
never a signal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn  # noqa: F401
from fastattn.functional import _registration

pytestmark = pytest.mark.native
WORKER = Path(__file__).with_name("bad_metadata.py")
BATCHES = [
    ("attention_forward", 500),
    ("attention_backward", 400),
    ("attention_jvp", 400),
    ("attention_double_backward", 400),
    ("linear_relu_forward", 400),
    ("linear_relu_backward", 400),
    ("linear_relu_jvp", 400),
    ("mlp_forward", 300),
    ("mlp_inference", 300),
    ("mlp_backward", 300),
    ("fma_probe", 50),
]


@pytest.mark.parametrize("op, count", BATCHES)
def test_no_signal(op, count):
    command = [sys.executable, str(WORKER), op, "0", str(count)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = result.stdout.splitlines()
    last = f"{result.returncode}: {lines[-1]}\n{result.stderr[-3000:]}"
    assert result.returncode == 0, last
    raised = int(lines[-1].split()[0])
    assert 0 < raised < count, "the calls are all good or all bad"


def test_every_op_is_called():
    named = {op for op, _ in BATCHES}
    assert named >= set(_registration._FUNCTIONS)
    assert all(hasattr(torch.ops.fastattn, op) for op in named)
