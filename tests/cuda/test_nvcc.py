"""The CUDA library as nvcc built it: registers and stack of every kernel, its matrix instructions,
and that it loads without a GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from fastattn import _extension

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "fastattn/_cuda.so"
# Registers at entry: 64 Ki over the threads of a block; setmaxnreg then shifts them to those that
# multiply. Kernels that read rows hold few.
ENTRY = {384: 168, 512: 128}

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists() or importlib.util.find_spec("triton") is None,
    reason="no CUDA library, or no Triton, whose package has cuobjdump",
)


def cuobjdump(*options: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [program, *options, LIBRARY]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_loads_without_a_gpu():
    assert _extension.HAS_CUDA, _extension.why_not_cuda()


def test_kernels_keep_to_their_registers():
    """A stack frame would mean spills, or registers indexed at run time."""
    usage = re.findall(
        r"Function (\w+):\n\s*REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", cuobjdump("-res-usage")
    )
    assert len(usage) > 20
    for name, registers, stack, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        multiplies = re.search(
            r"attention_(forward|backward)_kernel|13linear_kernelI|10mlp_kernelI", name
        )
        assert int(registers) in ENTRY.values() if multiplies else int(registers) <= 64, name


def test_matrix_products_run_asynchronously():
    """Products in a row, and none that waits for the one before it."""
    kernels = cuobjdump("-sass").split("Function : ")[1:]
    multiplying = [k for k in kernels if "HGMMA" in k]
    assert multiplying
    for text in multiplying:
        name = text.split()[0]
        for instruction in ("UTMALDG", "USETMAXREG", "SYNCS"):
            assert instruction in text, (name, instruction)
        products = " ".join(re.findall(r"HGMMA|WARPGROUP\.DEPBAR", text))
        assert "DEPBAR HGMMA WARPGROUP.DEPBAR HGMMA" not in products, name
