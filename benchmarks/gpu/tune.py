"""Times tiles: Triton's, and those of the CUDA forward at D = 64 that the tuning build has."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor

import fastattn
from fastattn import _extension
from fastattn.ops.triton import config
from gpu.cases import Attention
from gpu.hardware import Bench

# The numbers that fastattn_choose_forward64 takes (csrc/cuda/launch/attention_forward.cu).
FORWARD64 = (
    "as in config.cuh",
    "no polynomial, no slack",
    "1/16 by polynomial, slack 8",
    "2/16 by polynomial, slack 8",
    "4/16 by polynomial, slack 8",
)
ROUNDS = 3


def forward64(bench: Bench) -> Iterator[dict[str, object]]:
    """The tiles of the CUDA forward at D = 64, in rounds, the first one changing."""
    library = ctypes.CDLL(str(_extension.cuda_library()))
    choose = getattr(library, "fastattn_choose_forward64", None)
    if choose is None:
        raise RuntimeError("this CUDA library has no tiles to choose: FASTATTN_CUDA_VARIANT=tune")
    for mask in ("full", "causal"):
        case = Attention(2, 32, 8192, 64, mask)
        inputs = bench.timings.attention_inputs(case)[0]

        def forward(n: int, inputs: list = inputs, mask: str = mask) -> Tensor:
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
                error = ((forward(0).float() - expected).norm() / expected.norm()).item()
                if not error < 5e-3:
                    raise AssertionError(f"{FORWARD64[number]}: differs by {error}")
                times[number].append(bench.clock.median_ms(forward, len(inputs)))
        choose(0)
        for tile, of_tile in zip(FORWARD64, times, strict=True):
            yield _row(case, "forward", f"cuda: {tile}", statistics.median(of_tile))


def triton_tiles(bench: Bench, stop: float) -> Iterator[dict[str, object]]:
    """Every tile for D = 64 and 128, causal, one kernel at a time, until the clock says stop."""
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
    for dim in (128, 64):
        case = Attention(2, 16 if dim == 128 else 32, 8192, dim, "causal", backward=True)
        inputs, _ = bench.timings.attention_inputs(case)
        for kernel in ("forward", "keys", "queries"):
            for tile in tiles:
                if time.monotonic() > stop:
                    return

                def override(name, *rest, tile=tile, kernel=kernel):
                    return tile if name == kernel else chosen(name, *rest)

                config.tile = override
                try:
                    ms = _triton_ms(bench, kernel, inputs)
                except Exception as error:  # too much shared memory, a compiler's failure
                    yield {
                        "case": case.name,
                        "pass": kernel,
                        "implementation": f"triton: {tile}",
                        "note": type(error).__name__,
                    }
                    continue
                finally:
                    config.tile = chosen
                yield _row(case, kernel, f"triton: {tile}", ms)


def _triton_ms(bench: Bench, kernel: str, inputs: list[list[Tensor]]) -> float:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, backend="triton")

    if kernel == "forward":
        return bench.clock.median_ms(lambda n: ours(*(x.detach() for x in inputs[n])), len(inputs))
    wanted = slice(0, 1) if kernel == "queries" else slice(1, 3)
    outs = [ours(*x) for x in inputs]
    return bench.clock.median_ms(
        lambda n: torch.autograd.grad(outs[n], inputs[n][wanted], outs[n], retain_graph=True),
        len(inputs),
    )


def _row(case: Attention, what: str, implementation: str, ms: float) -> dict[str, object]:
    return {
        "case": case.name,
        "pass": what,
        "implementation": implementation,
        "ms": f"{ms:.4f}",
        "TFLOP/s": f"{case._replace(backward=False).flops / ms / 1e9:.0f}",
    }
