"""The kernels for Hopper, compiled by the C++ compiler against the emulated instructions and run
on the CPU; and that the emulation bites: a kernel without one of its waits, fences or barriers
fails."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import pytest
from emulated_program import ROOT, build, needs_compiler

pytestmark = needs_compiler
KERNELS = ROOT / "csrc/cuda/kernels"
# Tails, several tiles a block, one tile, fewer steps than stages: m, k, n, splits, blocks for
# the linear layer; for attention head dim, heads of q and k, lengths, window, padded keys, blocks,
# the exponent of large queries.
LINEAR = [
    (150, 200, 300, 2, 3),
    (1, 8, 8, 1, 1),
    (257, 448, 130, 1, 1),
    (70, 33, 19, 1, 2),
    (300, 136, 40, 3, 4),
]
# Rows, input, widths of up to three layers.
MLP = [
    (100, 200, 128, 10, 0),
    (64, 784, 128, 10, 0),
    (130, 72, 256, 200, 24),
    (1, 8, 8, 8, 8),
    (70, 16, 130, 256, 1),
]
ATTENTION = [
    (128, 2, 1, 200, 300, -1, 0, 0, 2, 0),
    (64, 2, 1, 200, 300, -1, 0, 0, 2, 0),
    (128, 4, 2, 257, 300, -1, -1, 37, 3, 0),
    (64, 2, 2, 300, 140, 20, 5, 0, 1, 0),
    (64, 1, 1, 1, 1, -1, 0, 0, 1, 0),
    (80, 2, 1, 300, 300, -1, 0, 0, 2, 0),
    (128, 2, 2, 300, 300, 40, 0, 150, 2, 0),
    (64, 2, 1, 200, 150, 10, -1, 0, 2, 0),
    (64, 1, 1, 100, 260, -1, 30, 30, 2, 0),
    (40, 3, 3, 70, 90, -1, -1, 0, 4, 0),
    (60, 2, 1, 70, 90, -1, 0, 0, 2, 0),
    (75, 1, 1, 90, 70, -1, -1, 9, 1, 0),
    # Scores of some thousands, of 10^9, and near the largest number.
    (64, 2, 1, 70, 150, -1, -1, 0, 2, 9),
    (128, 1, 1, 70, 150, -1, 0, 9, 1, 9),
    (64, 1, 1, 70, 150, -1, -1, 0, 1, 29),
    (128, 1, 1, 70, 150, 60, 0, 0, 1, 119),
]
CASES = {
    "linear": LINEAR,
    "mlp": MLP,
    "attention_forward": [
        *ATTENTION,
        (256, 2, 2, 130, 200, -1, -1, 0, 1, 0),
        (192, 1, 1, 70, 70, -1, 0, 9, 1, 0),
    ],
    "attention_backward": [
        *ATTENTION,
        # More blocks than the emulation has resident: a tile must not wait for one not yet taken.
        (64, 1, 1, 40, 1000, -1, -1, 0, 7, 0),
    ],
}
# What a kernel without a statement is run on: whole and partial tiles, with and without a mask.
MUTANT_CASES = {
    "linear": [(150, 200, 300, 1, 2)],
    "mlp": [(100, 800, 128, 100, 10), (70, 16, 130, 256, 1)],
    "attention_forward": [
        (128, 2, 1, 200, 700, -1, -1, 0, 2, 0),
        (64, 2, 1, 400, 300, -1, 0, 37, 2, 0),
    ],
    "attention_backward": [
        (128, 2, 1, 300, 300, -1, -1, 0, 3, 0),
        (64, 2, 1, 300, 300, -1, 0, 37, 2, 0),
        (128, 1, 1, 60, 300, -1, -1, 0, 2, 0),
        (64, 2, 1, 150, 100, 10, -1, 0, 2, 0),
    ],
}
# What may be missing unseen, and why.
HARMLESS = {
    "ptx::barrier_init_fence();": "the emulated mbarriers are seen by everybody at once",
    "ptx::registers_increase": "what a thread keeps is the compiler's affair: nvcc would spill",
    "ptx::fence_async_proxy_global();": "global memory has one view in the emulation",
    "ptx::named_sync(ForwardBarrier::kTurn": "warpgroups take turns for speed alone",
}
SYNCHRONISATION = re.compile(
    r"ptx::(barrier_wait|barrier_arrive|barrier_init_fence|block_sync|named_\w+|fence_\w+"
    r"|wgmma_fence|wgmma_commit|wgmma_wait|registers_\w+|bulk_commit|bulk_wait\w*|counter_\w+)"
    r"(<[^;>]+>)?\([^;]*\);"
)


def mutants(kernel: str) -> list[str]:
    """Every synchronisation of the kernel."""
    source = (KERNELS / f"{kernel}_sm90.h").read_text()
    return [match[0] for match in SYNCHRONISATION.finditer(source)]


ALL_MUTANTS = [(k, number, text) for k in CASES for number, text in enumerate(mutants(k))]


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The program that runs a kernel; its first argument is the synchronisation to leave out."""

    @functools.cache
    def program_of(kernel: str) -> Path:
        folder = tmp_path_factory.mktemp(kernel)
        text = (KERNELS / f"{kernel}_sm90.h").read_text()
        numbers = iter(range(len(mutants(kernel))))
        changed = SYNCHRONISATION.sub(
            lambda match: f"if (left_out() != {next(numbers)}) {match[0]}", text
        )
        target = folder / "cuda/kernels" / f"{kernel}_sm90.h"
        target.parent.mkdir(parents=True)
        declared = "namespace fastattn::cuda {\n\nint& left_out();\n"
        target.write_text(changed.replace("namespace fastattn::cuda {\n", declared, 1))
        source = ROOT / f"tests/cuda/{kernel}.cpp"
        build(source, folder / "program", "-O1", f"-I{folder}")
        return folder / "program"

    return program_of


def run(program: Path, left_out: int, cases: list[tuple]) -> subprocess.CompletedProcess[str]:
    arguments = [str(left_out), *(str(n) for case in cases for n in case)]
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("kernel", "case"), [(k, c) for k in CASES for c in CASES[k]], ids=lambda x: str(x)
)
def test_kernel(program, kernel, case):
    result = run(program(kernel), -1, [case])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("kernel", "number", "statement"), ALL_MUTANTS, ids=[f"{k}-{n}" for k, n, _ in ALL_MUTANTS]
)
def test_a_kernel_without_it_fails(program, record_property, kernel, number, statement):
    result = run(program(kernel), number, MUTANT_CASES[kernel])
    seen = result.stdout.strip() or f"exit status {result.returncode}"
    harmless = next((why for text, why in HARMLESS.items() if statement.startswith(text)), None)
    if result.returncode == 0:
        seen = f"nothing: {harmless}"
    record_property("mutant", (kernel, statement, seen))  # the run ends with a table of them
    assert (result.returncode != 0) == (harmless is None), seen
