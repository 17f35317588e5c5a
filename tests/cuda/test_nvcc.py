"""The CUDA library as nvcc built it: registers and stack of every kernel, its matrix instructions
and what runs beside them, and that it loads without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import statistics
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


@functools.cache
def kernels() -> dict[str, str]:
    """The machine code of every kernel."""
    return {text.split()[0]: text for text in cuobjdump("-sass").split("Function : ")[1:]}


def main_loop(kernel: str) -> list[str]:
    """The instructions of the loop around the products of a kernel. Spins that fail go on behind
    the kernel and jump back into the loop, which begins before any place they jump to."""
    instructions = re.findall(r"^\s+/\*(\w{4,})\*/\s+(.*?)\s*;", kernels()[kernel], re.MULTILINE)
    place = {int(address, 16): number for number, (address, _) in enumerate(instructions)}
    code = [text for _, text in instructions]
    loops = []
    for end, text in enumerate(code):
        target = re.search(r"\bBRA\b.*\b0x(\w+)$", text)
        begin = place[int(target[1], 16)] if target else end
        if any("HGMMA" in inside for inside in code[begin:end]):
            loops.append((begin, end + 1))
    holds = [any(b <= x and y <= e for x, y in loops if (x, y) != (b, e)) for b, e in loops]
    begin, end = min(loop for loop, outer in zip(loops, holds, strict=True) if not outer)
    return code[begin:end]


def threads_of(kernel: str) -> int | None:
    """The threads of a block of a kernel that multiplies, None for others."""
    if not re.search(r"attention_(forward|backward)_kernel|13linear_kernelI|10mlp_kernelI", kernel):
        return None
    return 512 if re.search(r"11ForwardTileI.*Li64ELb0E", kernel) else 384


def test_it_loads_without_a_gpu():
    assert _extension.HAS_CUDA, _extension.cuda_load_failure()


def test_ptxas_has_nothing_against_the_kernels():
    """C7508: setmaxnreg is ignored; C7510, C7512, C7520: products are serialised."""
    said = _extension.build_info["cuda"]["ptxas"]
    # A warpgroup.arrive that ptxas adds where registers pass from arithmetic to products.
    assert set(said) <= {"C7519"}, said


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
    for name, text in kernels().items():
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
    multiplying = {name: text for name, text in kernels().items() if "HGMMA" in text}
    assert multiplying
    for name, text in multiplying.items():
        assert not re.search(r"\b(LDL|STL)\b", text), name
        for instruction in ("UTMALDG", "USETMAXREG", "SYNCS"):
            assert instruction in text, (name, instruction)
        products = " ".join(re.findall(r"HGMMA|WARPGROUP\.DEPBAR", text))
        assert "DEPBAR HGMMA WARPGROUP.DEPBAR HGMMA" not in products, name


def test_powers_run_beside_products():
    """Of an attention kernel's step all exponentials lie between the wait for the scores, behind
    which products go on, and the wait for those."""
    attention = [name for name in kernels() if re.search(r"attention_\w+ward_kernel", name)]
    assert len(attention) == 20
    for name in attention:
        loop = " ".join(re.findall(r"MUFU\.EX2|gsb0, 0x\d", " ".join(main_loop(name))))
        steps = re.findall(r"gsb0, 0x1((?: MUFU\.EX2)*) gsb0, 0x0", loop)
        # A thread's share of 64 rows by as many columns as a step has.
        columns = 64 if re.search(r"Forward.*Li256E|Backward.*Li128E", name) else 128
        assert max((step.count("MUFU") for step in steps), default=0) >= columns // 2, (name, loop)


def test_products_follow_each_other():
    """Between two products there is little more than the step from an operand's descriptor to the
    next, in uniform registers throughout."""
    multiplying = [name for name in kernels() if threads_of(name)]
    assert len(multiplying) == 40
    for name in multiplying:
        loop = main_loop(name)
        products = [place for place, text in enumerate(loop) if "HGMMA" in text]
        between = [b - a - 1 for a, b in itertools.pairwise(products)]
        assert statistics.median(between) <= 6, (name, between)
        assert not any("R2UR" in text for text in loop), name


@pytest.mark.parametrize(
    ("kernel", "count", "loads", "stores"),
    [("delta_kernel", 4, 2, 0), ("grad_query_kernel", 4, 4, 2), ("key_words_kernel", 1, 2, 0)],
)
def test_rows_are_read_and_written_by_16_bytes(kernel, count, loads, stores):
    """Elements one by one only where a row is not aligned: in a loop, which is short."""
    found = {name: text for name, text in kernels().items() if kernel in name}
    assert len(found) >= count
    for name, text in found.items():
        code = re.findall(r"^\s+/\*\w{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9][\w.]*)", text, re.MULTILINE)
        assert code.count("LDG.E.128") == loads, name
        assert code.count("STG.E.128") == stores, name
        assert sum(instruction.startswith(("LDG.E.U", "STG.E.U")) for instruction in code) <= 4, (
            name
        )
        assert sum(instruction != "NOP" for instruction in code) < 320, name
