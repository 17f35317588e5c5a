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
# multiply, from those that load. Kernels that read rows hold few.
ENTRY = {384: 168, 512: 128}
SPLIT = {384: (232, 40), 512: (160, 32)}

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists() or importlib.util.find_spec("triton") is None,
    reason="no CUDA library, or no Triton, whose package has cuobjdump",
)


def cuobjdump(*options: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [program, *options, LIBRARY]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def threads_of(kernel: str) -> int | None:
    """The threads of a block of a kernel that multiplies, None for others."""
    if not re.search(r"attention_(forward|backward)_kernel|13linear_kernelI|10mlp_kernelI", kernel):
        return None
    return 512 if re.search(r"11ForwardTileI.*Li64ELb0E", kernel) else 384


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
        threads = threads_of(name)
        assert int(registers) == ENTRY[threads] if threads else int(registers) <= 64, name


def test_registers_are_split_as_in_the_table_of_tiles():
    table = (ROOT / "csrc/cuda/launch/config.cuh").read_text()
    listed = re.findall(r"//   (?:D = )?\d+ .*? KB +(\d+):", table)
    assert listed == ["160", *["232"] * 9], "threads_of, SPLIT and the table go together"
    seen = 0
    for text in cuobjdump("-sass").split("Function : ")[1:]:
        name = text.split()[0]
        splits = re.findall(r"USETMAXREG\.(TRY_ALLOC|DEALLOC)\.CTAPOOL (?:UP\d, )?0x(\w+)", text)
        if (threads := threads_of(name)) is None:
            assert not splits, name
            continue
        seen += 1
        more, fewer = SPLIT[threads]
        assert {what: int(count, 16) for what, count in splits} == {
            "TRY_ALLOC": more,
            "DEALLOC": fewer,
        }, name
        assert max(map(int, re.findall(r"\bR(\d+)\b", text))) < more, name
        # What warpgroups hold then is no more than what the block had.
        assert fewer + (threads // 128 - 1) * more <= ENTRY[threads] * threads // 128
    assert seen >= 40


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
