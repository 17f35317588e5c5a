"""The loop that every product spends its time in, as the compiler left it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fastattn
from fastattn import _extension

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump"),
]

LIBRARY = Path(fastattn.__file__).parent / "_ops.so"
FMA = re.compile(r"vfmadd\d+p[sd]|vdpbf16ps")
TILE = re.compile(r"cpu::(avx\w+)::micro_kernel_tile<(?:\S*::)?(\w+), 6, (\d), ")


def functions() -> dict[tuple[str, str, int], list[list[str]]]:
    """(instruction set, operand, vectors a row) -> the instructions of each such function."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(LIBRARY)]
    found: dict[tuple[str, str, int], list[list[str]]] = {}
    current: list[str] | None = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.endswith(">:\n"):
                match = TILE.search(line)
                current = None
                if match:
                    key = (match[1], match[2], int(match[3]))
                    found.setdefault(key, []).append(current := [])
            elif current is not None and "\t" in line:
                current.append(line.rstrip())
    return found


def inner_loops(instructions: list[str]) -> list[list[str]]:
    """The bodies of the innermost loops with multiply-adds."""
    address = {line.split(":")[0].strip(): i for i, line in enumerate(instructions)}
    spans = []
    for i, line in enumerate(instructions):
        jump = re.search(r"\tj\w+\s+([0-9a-f]+)", line)
        target = address.get(jump[1]) if jump else None
        if target is not None and target <= i:
            spans.append((target, i))
    innermost = [
        a for a in spans if not any(b != a and a[0] <= b[0] <= b[1] <= a[1] for b in spans)
    ]
    bodies = [instructions[a : b + 1] for a, b in innermost]
    # What returns is no loop: a jump back to the end, where there is no depth.
    bodies = [body for body in bodies if not any(line.endswith("\tret") for line in body)]
    return [body for body in bodies if any(map(FMA.search, body))]


def test_the_inner_loop_keeps_its_accumulators_in_registers():
    found = functions()
    built = [isa for isa in _extension.build_info["isas"] if isa.startswith("avx")]
    expected = {
        (isa, operand, 2 if isa == "avx2" else 4)
        for isa in built
        for operand in (["Pair"] if isa == "avx512bf16" else ["float", "double"])
    }
    assert expected <= set(found)
    for isa, operand, vectors in expected:
        for instructions in found[isa, operand, vectors]:
            loops = inner_loops(instructions)
            assert loops, (isa, operand, vectors)
            for loop in loops:
                check_loop(loop, vectors)


def check_loop(loop: list[str], vectors: int) -> None:
    text = "\n".join(loop)
    products = len(FMA.findall(text))
    assert products % (6 * vectors) == 0, text
    # No store: nothing is spilled. Nothing is read from the stack, either.
    assert not re.search(r"\tv?mov\w*\s+%\w+,[^%\s]*\(", text), text
    assert "%rsp" not in text, text
    # A row of B once, a value of A once a row, and the loop's own counting.
    assert len(loop) <= products // (6 * vectors) * (6 * vectors + vectors + 6) + 8, text


def test_the_search_sees_a_spill():
    loop = """
  10:\tvmovups (%rax),%ymm1
  14:\tvfmadd231ps %ymm1,%ymm2,%ymm3
  18:\tvmovups %ymm3,0x20(%rsp)
  1c:\tjne    10 <f+0x10>
  20:\tret"""
    (found,) = inner_loops(loop.strip("\n").split("\n"))
    assert len(found) == 4
    assert re.search(r"\tv?mov\w*\s+%\w+,[^%\s]*\(", "\n".join(found))
