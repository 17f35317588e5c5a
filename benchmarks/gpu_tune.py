"""Times tiles of the attention kernels on a GPU: ``gpu_check.py --tune``.

Writes ``tune.csv``, Triton's tiles for D = 64 and 128, and ``forward64.csv``, the CUDA forward at
D = 64 with and without its treatment of powers, into ``--output``.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import statistics
import time
from pathlib import Path

import torch
from gpu import attention_inputs, median_ms
from gpu_cases import Attention
from torch import Tensor

import fastattn
from fastattn import backends
from fastattn.ops.triton import config

# The numbers that fastattn_choose_forward64 takes (csrc/cuda/launch/attention_forward.cu).
FORWARD64 = (
    "as in config.cuh",
    "no polynomial, no slack",
    "1/16 by polynomial, slack 8",
    "2/16 by polynomial, slack 8",
    "4/16 by polynomial, slack 8",
)
ROUNDS = 5


def forward64(output: Path, stop: float) -> None:
    """The tiles of the CUDA forward at D = 64, in rounds, the first one changing."""
    if "cuda" not in backends.available():
        print("forward64: the cuda backend is not there", flush=True)
        return
    library = ctypes.CDLL(str(Path(fastattn.__file__).parent / "_cuda.so"))
    choose = getattr(library, "fastattn_choose_forward64", None)
    if choose is None:
        print("forward64: build with FASTATTN_BUILD_TUNE=1", flush=True)
        return
    with (output / "forward64.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "tile", "ms", "TFLOP/s"))
        for mask in ("full", "causal"):
            for seq in (4096, 8192, 16384):
                if time.monotonic() > stop:
                    return
                case = Attention(16384 // seq, 32, seq, 64, mask=mask)
                inputs = [[x.detach() for x in qkv] for qkv in attention_inputs(case)[0]]

                def forward(n, inputs=inputs, mask=mask):
                    return fastattn.scaled_dot_product_attention(
                        *inputs[n], is_causal=mask == "causal", backend="cuda"
                    )

                choose(0)
                expected = forward(0).float()
                times: list[list[float]] = [[] for _ in FORWARD64]
                for first in range(ROUNDS):
                    for step in range(len(FORWARD64)):
                        number = (first + step) % len(FORWARD64)
                        choose(number)
                        worst = (forward(0).float() - expected).abs().max().item()
                        if not worst < 0.01:
                            raise AssertionError(f"{FORWARD64[number]}: differs by {worst}")
                        times[number].append(median_ms(forward, len(inputs)))
                choose(0)
                for tile, of_tile in zip(FORWARD64, times, strict=True):
                    ms = statistics.median(of_tile)
                    row = (case.name, tile, f"{ms:.4f}", f"{case.flops / ms / 1e9:.0f}")
                    writer.writerow(row)
                    print(*row, flush=True)
                file.flush()


def triton_tiles(output: Path, stop: float) -> None:
    """Every tile for D = 64 and 128, causal, one kernel at a time."""
    chosen = config.tile
    tiles = [
        config.Tile(q, k, warps, stages, tma)
        for q in (32, 64, 128)
        for k in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3)
        for tma in (True, False)
        if q * k >= 2048
    ]
    with (output / "tune.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kernel", "dim", *config.Tile._fields, "ms"))
        for dim in (128, 64):
            case = Attention(2, 16 if dim == 128 else 32, 8192, dim, mask="causal")
            inputs, _ = attention_inputs(case)
            for kernel in ("forward", "keys", "queries"):
                for tile in tiles:
                    if time.monotonic() > stop:
                        return

                    def override(name, *rest, tile=tile, kernel=kernel):
                        return tile if name == kernel else chosen(name, *rest)

                    config.tile = override
                    try:
                        ms = tuned_ms(kernel, inputs)
                    except Exception as error:  # too much shared memory, a compiler's failure
                        print(kernel, dim, tile, type(error).__name__, flush=True)
                        continue
                    writer.writerow((kernel, dim, *tile, f"{ms:.4f}"))
                    file.flush()
    config.tile = chosen


def tuned_ms(kernel: str, inputs: list[list[Tensor]]) -> float:
    def ours(q, k, v):
        return fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, backend="triton")

    if kernel == "forward":
        return median_ms(lambda n: ours(*(x.detach() for x in inputs[n])), len(inputs))
    wanted = slice(0, 1) if kernel == "queries" else slice(1, 3)
    outs = [ours(*x) for x in inputs]
    return median_ms(
        lambda n: torch.autograd.grad(outs[n], inputs[n][wanted], outs[n], retain_graph=True),
        len(inputs),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"))
    parser.add_argument("--seconds", type=float, default=240, help="begin no timing after this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    stop = time.monotonic() + options.seconds
    forward64(options.output, stop)
    triton_tiles(options.output, stop)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
