"""The kernels for Hopper, compiled by nvcc where there is one: no spills, matrix instructions that
are not serialised, tensor copies."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").rglob("*.cu"))

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def name_of(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_kernels_keep_to_their_registers(source, tmp_path):
    cubin = tmp_path / "kernel.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a"]
    command += [f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-cubin", "-o", str(cubin), str(source)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", output)
    assert kernels
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", output)
    assert frames == [("0", "0")] * len(kernels), output
    assert "serialized" not in output
    # 384 threads: 168 registers each before setmaxnreg shifts them.
    assert {int(n) for n in re.findall(r"Used (\d+) registers", output)} <= {168}
    if importlib.util.find_spec("triton") is None:
        return
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    sass = subprocess.run(
        [cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    for instruction in ("HGMMA", "UTMALDG", "USETMAXREG"):
        assert sass.count(instruction) >= len(kernels), instruction
