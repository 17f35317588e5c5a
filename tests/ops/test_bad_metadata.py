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
BATCHES = [  # a process each, as many calls of each op
    (250, ["attention_forward", "attention_backward"]),
    (250, ["attention_jvp", "attention_double_backward"]),
    (200, ["linear_relu_forward", "linear_relu_backward", "linear_relu_jvp", "fma_probe"]),
    (200, ["mlp_forward", "mlp_inference", "mlp_backward"]),
    (250, ["dropout_add_norm_forward", "dropout_add_norm_backward"]),
    (250, ["activation_forward", "activation_backward", "gated_linear_forward"]),
    (250, ["linear_forward", "linear_backward", "training_step"]),
]


@pytest.mark.parametrize("count, ops", BATCHES)
def test_no_signal(count, ops):
    command = [sys.executable, str(WORKER), "0", str(count), *ops]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    last = result.stdout.splitlines()[-1:]
    assert result.returncode == 0, f"{result.returncode}: {last}\n{result.stderr[-3000:]}"


def test_every_op_is_called():
    named = {op for _, ops in BATCHES for op in ops}
    assert named >= set(_registration._FUNCTIONS)
    assert all(hasattr(torch.ops.fastattn, op) for op in named)
