"""The kernels for Hopper, compiled by the C++ compiler against the emulated instructions and run
on the CPU; and that the emulation bites: a kernel without one of its waits, fences or barriers
fails."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNEL = ROOT / "csrc/cuda/kernels/linear_relu_sm90.h"
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
# m, k, n, blocks: tails everywhere, several tiles a block, one tile, fewer steps than stages.
SHAPES = [(150, 200, 300, 2), (1, 8, 8, 1), (257, 448, 130, 1)]
# What may be missing unseen, and why.
HARMLESS = {
    "ptx::barrier_init_fence();": "the emulated mbarriers are seen by everybody at once",
    "ptx::registers_decrease<40>();": "registers are not counted",
    "ptx::registers_increase<232>();": "registers are not counted",
}

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def build(program: Path, include: Path) -> None:
    source = ROOT / "tests/cuda/linear_relu.cpp"
    flags = ["-std=c++20", "-O1", f"-I{include}", f"-I{ROOT / 'csrc'}"]
    command = [*shlex.split(CXX), *flags, str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def run(program: Path, *shapes: tuple[int, ...]) -> subprocess.CompletedProcess[str]:
    arguments = [str(n) for shape in shapes for n in shape]
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def mutants() -> list[tuple[int, str]]:
    """(line, statement) of every synchronisation of the kernel."""
    found = []
    for number, line in enumerate(KERNEL.read_text().splitlines()):
        match = re.search(
            r"ptx::(barrier_wait|barrier_arrive|barrier_init_fence|block_sync"
            r"|wgmma_fence|wgmma_commit|wgmma_wait|registers_\w+)"
            r"(<\d+>)?\([^;]*\);",
            line,
        )
        if match:
            found.append((number, match[0]))
    return found


def test_linear_relu(tmp_path):
    build(tmp_path / "program", tmp_path)
    result = run(tmp_path / "program", *SHAPES)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("line", "statement"), mutants(), ids=lambda x: str(x)[:40])
def test_a_kernel_without_it_fails(tmp_path, line, statement):
    lines = KERNEL.read_text().splitlines()
    lines[line] = lines[line].replace(statement, ";")
    mutant = tmp_path / "cuda/kernels" / KERNEL.name
    mutant.parent.mkdir(parents=True)
    mutant.write_text("\n".join(lines))
    build(tmp_path / "program", tmp_path)
    result = run(tmp_path / "program", *SHAPES[:1])
    print(f"{statement}: {result.stdout.strip() or 'nothing seen'}")
    assert (result.returncode != 0) == (statement not in HARMLESS), result.stdout


def test_shared_memory_ends_where_it_ends(tmp_path):
    source = tmp_path / "program.cpp"
    source.write_text("""
#include "cuda/ptx/ptx.h"
#include <cstdio>
using namespace fastattn::cuda;
int main() {
  ptx::TensorMap map;
  map.rank = 1;
  map.box[0] = 64;
  try {
    emulator::Block block(32, 1024, {});
    block.run([&] {
      auto* barrier = reinterpret_cast<ptx::Barrier*>(ptx::dynamic_shared_memory());
      if (ptx::thread_id() != 0) return;
      ptx::barrier_init(barrier, 1);
      ptx::tma_load(ptx::dynamic_shared_memory() + 1024 - 64, &map, barrier, 0);
    });
  } catch (const emulator::Error& error) {
    std::puts(error.what());
  }
}""")
    program = tmp_path / "program"
    command = [*shlex.split(CXX), "-std=c++20", f"-I{ROOT / 'csrc'}", str(source), "-o", program]
    subprocess.run(command, check=True)
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert "of 1024 bytes" in output
