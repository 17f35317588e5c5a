"""Each example for a few steps: it ends well, leaves its plot, and prints sane numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NUMBER = r"([\d.]+(?:e-?\d+)?)"

pytestmark = [pytest.mark.slow, pytest.mark.native]


def run(name: str, steps: int, output: Path) -> str:
    """What it prints."""
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    command = [sys.executable, str(ROOT / f"examples/{name}.py"), f"--steps={steps}"]
    done = subprocess.run(
        [*command, f"--output={output}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (output / f"{name}.png").stat().st_size > 10_000
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(x) for x in re.search(pattern.replace("#", NUMBER), text).groups()]


def test_gradient_penalty(tmp_path):
    text = run("gradient_penalty", 4, tmp_path)
    assert all(float(x) <= 1e-3 for x in re.findall(rf"agree to {NUMBER},", text))
    assert all(0.2 < float(x) < 20 for x in re.findall(rf"takes {NUMBER}x", text))
    most, last = numbers("estimate: # at most, # at last", text)
    assert most >= last


def test_hessian_eigenvalue(tmp_path):
    text = run("hessian_eigenvalue", 6, tmp_path)
    (difference,) = numbers("products agree to #", text)
    assert difference < 1e-5
    first, last, eigenvalue = numbers("loss # -> #, .* eigenvalue # at first", text)
    assert last < first
    assert 1 < eigenvalue < 100


def test_meanflow(tmp_path):
    text = run("meanflow", 20, tmp_path)
    first, last = numbers("error: # at first, # at last", text)
    assert last < 0.9 * first
