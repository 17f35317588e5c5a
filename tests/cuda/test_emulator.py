"""The kernels for Hopper, compiled by the C++ compiler against the emulated instructions and run
on the CPU; and that the emulation bites: a kernel without one of its waits, fences or barriers
fails."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc/cuda/kernels"
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
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

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def mutants(kernel: str) -> list[str]:
    """Every synchronisation of the kernel."""
    source = (KERNELS / f"{kernel}_sm90.h").read_text()
    return [match[0] for match in SYNCHRONISATION.finditer(source)]


ALL_MUTANTS = [(k, number, text) for k in CASES for number, text in enumerate(mutants(k))]


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The program that runs a kernel; its first argument is the synchronisation to leave out."""

    @functools.cache
    def build(kernel: str) -> Path:
        folder = tmp_path_factory.mktemp(kernel)
        source = (KERNELS / f"{kernel}_sm90.h").read_text()
        numbers = iter(range(len(mutants(kernel))))
        changed = SYNCHRONISATION.sub(
            lambda match: f"if (left_out() != {next(numbers)}) {match[0]}", source
        )
        target = folder / "cuda/kernels" / f"{kernel}_sm90.h"
        target.parent.mkdir(parents=True)
        declared = "namespace fastattn::cuda {\n\nint& left_out();\n"
        target.write_text(changed.replace("namespace fastattn::cuda {\n", declared, 1))
        flags = [
            "-std=c++20",
            "-O1",
            f"-I{folder}",
            f"-I{ROOT / 'csrc'}",
            f"-I{ROOT / 'tests/cuda'}",
        ]
        command = [*shlex.split(CXX), *flags, str(ROOT / f"tests/cuda/{kernel}.cpp")]
        subprocess.run([*command, "-o", str(folder / "program")], check=True)
        return folder / "program"

    return build


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


def output_of(tmp_path: Path, source: str) -> str:
    """What a program prints, compiled against the emulated instructions."""
    (tmp_path / "program.cpp").write_text(source)
    program = tmp_path / "program"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda'}"]
    command = [*shlex.split(CXX), "-std=c++20", *includes, str(tmp_path / "program.cpp")]
    subprocess.run([*command, "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout


def test_shared_memory_ends_where_it_ends(tmp_path):
    output = output_of(
        tmp_path,
        """
#include "emulated.h"
using namespace fastattn::cuda;
int main() {
  Tensor4 rows(1, 1, 8, 64);
  const ptx::TensorMap map = rows.map(8);
  try {
    emulator::run_grid(1, 32, 1024, {}, [&] {
      auto* barrier = reinterpret_cast<ptx::Barrier*>(ptx::dynamic_shared_memory());
      if (ptx::thread_id() != 0) return;
      ptx::barrier_init(barrier, 1);
      ptx::tma_load(ptx::dynamic_shared_memory() + 64, &map, barrier, 0, 0, 0, 0);
    });
  } catch (const emulator::Error& error) {
    std::puts(error.what());
  }
}""",
    )
    assert "of 1024 bytes" in output


# A thread stores 1, overwrites it by 2 while the copy to `to` is under way, or publishes it late.
STORES = """
#include "emulated.h"
using namespace fastattn::cuda;
int main() {
  for (const bool late : {false, true}) {
    for (uint64_t seed = 0; seed < 20; ++seed) {
      DeviceVector<float> to(4, 0.0f);
      const emulator::Timing timing{seed, seed == 0, seed == 1};
      emulator::run_grid(1, 32, 1024, timing, [&] {
        char* smem = ptx::dynamic_shared_memory();
        const bool first = ptx::thread_id() == 0;
        if (first) {
          ptx::store_shared(smem, ptx::Floats4{1, 1, 1, 1});
          if (!late) ptx::fence_async_proxy();
          ptx::bulk_store(to.data(), smem, 16);
          ptx::bulk_commit();
        }
        ptx::block_sync();
        if (!first) return;
        if (!late) ptx::store_shared(smem, ptx::Floats4{2, 2, 2, 2});
        ptx::fence_async_proxy();
        ptx::bulk_wait();
      });
      std::printf("%g ", to[0]);
    }
  }
}"""


def test_a_store_reads_at_any_moment_up_to_its_wait(tmp_path):
    output = output_of(tmp_path, STORES).split()
    overwritten, published_late = output[:20], output[20:]
    assert overwritten[:2] == ["2", "1"]  # read as late as it may be; at once
    assert set(overwritten[2:]) == {"1", "2"}
    assert published_late[0] == "1"
    assert "nan" in published_late[1]
    assert len(set(published_late[2:])) == 2


# What is wrong, what the emulation says of it.
RULES = {
    "map = new (maps + 16) ptx::TensorMap(*map)": "TMA needs a map at 0 modulo 64, got 16",
    "map->rank = 2": "TMA needs as many coordinates as the map has dims, got 2",
    "map->base += 8": "TMA needs a tensor at 0 modulo 16, got 8",
    "map->extents[2] = 0": "TMA needs extents of 1 to 2^32, got 0",
    "map->box[1] = 257": "TMA needs boxes of 1 to 256, got 257",
    "map->box[1] = 0": "TMA needs boxes of 1 to 256, got 0",
    "map->stride_bytes[1] = 120": "TMA needs strides that are multiples of 16 bytes below 2^40",
    "map->stride_bytes[3] = int64_t{1} << 40": "TMA needs strides that are multiples of 16 bytes",
    "map->box[0] = 60": "TMA needs rows of a box of multiples of 16 bytes, got 120",
    "map->box[0] = 72": "TMA needs rows of a box within the swizzle, got 144",
    "box += 512": "TMA needs shared memory aligned for its swizzle",
    "map->swizzle = ptx::Swizzle::kNone, box += 64": "TMA needs shared memory aligned",
    "global += 2": "A bulk copy needs global memory at 0 modulo 16, got 8",
    "line += 8": "A bulk copy needs shared memory at 0 modulo 16",
    "bytes = 24": "A bulk copy needs a multiple of 16 bytes, got 24",
    "barrier += 4": "mbarrier: not at a multiple of 8 bytes",
    "arrivals = 0": "mbarrier: 1 to 2^20 - 1 arrivals",
    "expected = 1 << 20": "mbarrier: expects 2^20 bytes or more",
    "words = global + 1": "a load: an address 4 bytes beyond a multiple of 16",
}


def test_addresses_and_sizes_are_checked_as_the_hardware_does(tmp_path):
    """By each of the copies; without a mistake they all go through."""
    mistakes = "".join(f"case {i + 1}: {mistake}; break;\n" for i, mistake in enumerate(RULES))
    output = output_of(
        tmp_path,
        """
#include "emulated.h"
using namespace fastattn::cuda;
alignas(64) char maps[256];
void run(int copy, int mistake) {
  Tensor4 rows(1, 1, 8, 64);
  DeviceVector<float> line_of(64, 0.0f);
  ptx::TensorMap of_rows = rows.map(8), *map = &of_rows;
  emulator::run_grid(1, 1, 200 * 1024, {}, [&] {
    char *box = ptx::dynamic_shared_memory() + 1024, *line = ptx::dynamic_shared_memory() + 256;
    char* barrier = ptx::dynamic_shared_memory();
    float *global = line_of.data(), *words = global;
    int bytes = 64, arrivals = 1, expected = copy == 0 ? 1024 : 64;
    switch (mistake) {
"""
        + mistakes
        + """
    }
    ptx::load_global<ptx::Floats4>(words);
    auto* full = reinterpret_cast<ptx::Barrier*>(barrier);
    ptx::barrier_init(full, arrivals);
    if (copy < 2) ptx::barrier_arrive_expect(full, expected);
    if (copy == 0) ptx::tma_load(box, map, full, 0, 0, 0, 0);
    if (copy == 1) ptx::bulk_load(line, global, full, bytes);
    if (copy == 2) ptx::tma_store(map, box, 0, 0, 0, 0);
    if (copy == 3) ptx::bulk_store(global, line, bytes);
    if (copy == 4) ptx::bulk_add(global, line, bytes);
    if (copy < 2) ptx::barrier_wait(full, 0);
    ptx::bulk_commit();
    ptx::bulk_wait();
  });
}
int main() {
  for (int mistake = 0; mistake <= """
        + str(len(RULES))
        + """; ++mistake) {
    for (int copy = 0; copy < 5; ++copy) {
      try {
        run(copy, mistake);
        std::puts("done");
      } catch (const emulator::Error& error) {
        std::puts(error.what());
      }
    }
  }
}""",
    ).splitlines()
    assert output[:5] == ["done"] * 5
    for i, (mistake, message) in enumerate(RULES.items()):
        said = output[5 * i + 5 : 5 * i + 10]
        of_box, of_line = [said[0], said[2]], [said[1], *said[3:]]
        if message.startswith("TMA"):
            wrong, right = of_box, of_line
        elif message.startswith("A bulk"):
            wrong, right = of_line, of_box
        elif "expects" in message:
            wrong, right = said[:2], said[2:]
        else:
            wrong, right = said, []
        assert all(message in text for text in wrong), (mistake, said)
        assert right == ["done"] * len(right), (mistake, said)


def test_a_deadlock_names_the_barrier(tmp_path):
    output = output_of(
        tmp_path,
        """
#include "emulated.h"
using namespace fastattn::cuda;
int main() {
  try {
    emulator::run_grid(1, 32, 1024, {}, [] {
      auto* full = reinterpret_cast<ptx::Barrier*>(ptx::dynamic_shared_memory());
      if (ptx::thread_id() == 0) ptx::barrier_init(full + 1, 1);
      ptx::block_sync();
      ptx::barrier_wait(full + 1, 0);
    });
  } catch (const emulator::Error& error) {
    std::puts(error.what());
  }
}""",
    )
    assert "deadlock: 32 threads wait for mbarrier full + 1 in line 10" in output


def test_more_registers_than_were_given_up_are_a_deadlock(tmp_path):
    output = output_of(
        tmp_path,
        """
#include "cuda/ptx/ptx.h"
#include <cstdio>
using namespace fastattn::cuda;
int main() {
  try {
    emulator::run_grid(1, 384, 1024, {}, [] {
      if (ptx::thread_id() < 128) ptx::registers_decrease<32>();
      else ptx::registers_increase<240>();
    });
  } catch (const emulator::Error& error) {
    std::puts(error.what());
  }
}""",
    )
    assert re.search(r"deadlock: \d+ threads wait for registers", output)


def test_powers_by_polynomial(tmp_path):
    """Exact to the rounding of fp16, whose unit is 4.9e-4; exact where a softmax relies on it."""
    output = output_of(
        tmp_path,
        """
#include "cuda/tile/softmax.h"
#include <cstdio>
using namespace fastattn::cuda;
int main() {
  double worst = 0;
  for (double x = -126; x <= 9; x += 1e-4) {
    const auto f = static_cast<float>(x);
    const double power = exp2_by_polynomial(f), right = std::exp2(static_cast<double>(f));
    worst = std::fmax(worst, std::abs(power / right - 1));
  }
  std::printf("%g", worst);
  for (const float x : {-INFINITY, -1000.0f, -127.0f, 0.0f, 8.0f, NAN})
    std::printf(" %g", exp2_by_polynomial(x));
}""",
    )
    worst, *powers = output.split()
    assert float(worst) < 3e-6
    assert powers == ["0", "0", "0", "1", "256", "nan"]


def test_the_table_of_tiles_tells_the_truth(tmp_path):
    output = output_of(
        tmp_path,
        """
#include <cstdio>
#include "cuda/launch/config.cuh"
#include "emulated.h"
using namespace fastattn::cuda;
template <class... Tile>
void print() { (std::printf("%d ", Tile::kSharedBytes / 1024), ...); }
int main() {
  using T = bf16;
  constexpr auto kForward = LinearPass::kForward;
  print<ForwardTile<T, 64, false>, ForwardTile<T, 64, true>, ForwardTile<T, 128, true>,
        ForwardTile<T, 256, true>, BackwardTile<T, 64, true>, BackwardTile<T, 128, true>,
        LinearTile<T, kForward, 256>, LinearTile<T, kForward, 128>, MlpTile<T, true, 256>,
        MlpTile<T, true, 128>>();
}""",
    )
    table = (ROOT / "csrc/cuda/launch/config.cuh").read_text()
    assert re.findall(r"//   (?:D = )?\d+ .*?(\d+) KB", table) == output.split()
