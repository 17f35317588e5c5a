"""The kernel tests again on the instruction sets that the dispatch did not choose here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn import _extension

pytestmark = pytest.mark.native

# Every kernel, dtype and kind of mask, on the shapes that leave remainders everywhere.
FILES = (
    "test_attention_kernels.py",
    "test_linear_kernels.py",
    "test_linear_sizes_of_zero.py",
    "test_training_kernels.py",
    "test_layer_kernels.py",
    "test_norm_kernels.py",
    "test_second_order_kernels.py",
    "test_error_policy.py",
    "test_extreme_scores.py",
    "test_extreme_gradients.py",
)
SLOW_SHAPES = ("130x513", "400x270", "257x300")


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16", "emulated"])
def test_kernels_of_every_instruction_set(isa):
    if isa == _extension.cpu_isa():
        pytest.skip(f"{isa} is what all the other tests run")
    program = "from fastattn import _extension as e; print(e.load_failure() or e.cpu_isa())"
    environment = os.environ | {"FASTATTN_CPU_ISA": isa}
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    if "cannot run" in answer or ("not in this build" in answer and isa == "emulated"):
        pytest.skip(answer)
    assert answer == isa
    tests = [str(Path(__file__).parent / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    chosen = " and ".join(f"not {shape}" for shape in SLOW_SHAPES)
    if isa == "avx512" and _extension.cpu_isa() == "avx512bf16":
        chosen += " and (bf16 or bfloat16)"  # the other dtypes' kernels are the same
    command += ["-k", chosen]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
