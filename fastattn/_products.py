"""Whose product of a Linear is faster on this processor, the kernels' or torch's: the one rule.

It was measured in pairs, one thread, by ``benchmarks/linear_table.py``; the tables are
``benchmarks/results/*/linear.csv``. Torch's time over the kernels', forward and training step:

- a 16-bit dtype that torch has no product for here (float16 without avx512_fp16, bfloat16 too
  without avx512_bf16), from 262 thousand multiply-adds on: 1.3 to 12 with one row, 1.9 to 28 with
  4, 2.2 to 39 with more;
- on processors with avx512_bf16 and without AMX (Zen 4 and later) bfloat16, which torch has a
  product for: 1.2 to 1.9 with up to 4 rows, about 1 with more;
- on an Intel Xeon with AVX-512 and AMX, with a ReLU behind the product, 2 threads: float32 0.8 to
  1.0, float16 0.7 to 1.0, bfloat16 0.1 to 0.2; with one row of 16 bits 1.3 to 1.8. Intel's
  processors with AVX-512 therefore take torch's product in these dtypes, but for that one row,
  whatever follows it. Those without AMX were not measured: float32 is MKL's there too, and the
  16-bit dtypes that they have no product in stay with the kernels;
- on Zen 4 float32, for which torch's product is MKL's: 1.1 to 1.9 with 2 to 16 rows from 2 million
  multiply-adds on, 1.05 to 1.7 with more rows from 67 million on. On AVX2 it is 0.7 to 1.4;
- on Zen 5, whose AVX-512 units are twice as wide, while MKL keeps to AVX2 on AMD's processors:
  1.4 to 2.6 forward and 1.05 to 1.6 as a training step from 2 million multiply-adds on, with 2 rows
  or more. bfloat16 is as on Zen 4; with a GELU behind the product it is 0.9 to 1.2.
"""

from __future__ import annotations

import itertools
import math
import re

import torch

from fastattn import _extension

LEAST_HALF = 1 << 18  # multiply-adds, of a 16-bit dtype
LEAST_FEW, LEAST_MANY = 1 << 21, 1 << 26  # of float32
FEW_ROWS = 16
MOST_ROWS = 4  # of bfloat16, beside torch's product
LEAST_WIDTH = 32
# Elements of a float32 weight whose module is worth a swap. A call that stays torch's takes 1 us
# longer then (6.4 us are 7.4 for 64 -> 64), of 16 rows of 384 -> 384 1 %.
LEAST_WEIGHT = 1 << 17


def _lacking() -> frozenset[torch.dtype]:
    try:
        has = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
    except AttributeError:  # a torch without oneDNN: nothing was measured there
        return frozenset()
    return frozenset(dtype for dtype, there in has.items() if not there)


def _zen4() -> bool:
    try:
        amx = torch.cpu._is_amx_tile_supported()
    except AttributeError:
        return False
    return _extension.cpu_isa() == "avx512bf16" and not amx


def _zen5() -> bool:
    """An EPYC or Ryzen of the fifth generation, family 26. Only Linux says so here."""
    if not _zen4():
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            first = "".join(itertools.islice(lines, 8))  # a machine may have hundreds of cores
    except OSError:
        return False
    amd = "AuthenticAMD" in first
    return amd and re.search(r"^cpu family\s*:\s*26$", first, re.MULTILINE) is not None


def _intel() -> bool:
    """An Intel processor with AVX-512: AMD's first with it have avx512_bf16 too, and no AMX."""
    try:
        amx = torch.cpu._is_amx_tile_supported()
    except AttributeError:
        return False
    return _extension.cpu_isa() == "avx512" or (_extension.cpu_isa() == "avx512bf16" and amx)


_LACKING = _lacking()
_ZEN4 = _zen4()  # and Zen 5
_ZEN5 = _zen5()
_INTEL = _intel()
_GENERIC = _extension.cpu_isa() == "generic"


def torch_multiplies(input: torch.Tensor) -> bool:
    """Whether torch's product of input ``[..., K]`` in its dtype with any weight is so much faster
    on this processor that the kernels' epilogue does not repay theirs."""
    if not _INTEL or not input.is_cpu or input.dtype in _LACKING:
        return False
    if input.dtype in (torch.bfloat16, torch.float16):
        return input.numel() != input.shape[-1]
    return input.dtype == torch.float32


# Multiply-adds of a network's forward up to which ``TrainingStep`` takes its kernel: the largest
# that were timed. Torch's time over the kernel's, processor time of one thread, SGD with momentum
# and Adam (fused=True), on an EPYC that does 225 float32 GFLOP/s a thread: at 6.5 million
# (784-128-10, 64 rows) 2.3, at 50 million 1.8 to 2.1, at 10^9 1.9 to 2.0; in float64 2.0 and 1.5 to
# 1.7. By its AVX2 kernels 1.4 to 1.5, 1.2 and 1.2; in float64 1.4 and 1.1 to 1.3.
MOST_TRAINED = 1 << 30
# Beside MKL on Intel's AVX-512, whose products take 0.8 to 1.0 of the kernels' time: there a step
# gains what it saves beside them, about 0.15 ms. This was not timed.
MOST_TRAINED_BY_MKL = 1 << 23
# By kernels without AVX, where 6.4 million take 0.6 to 1.0 of torch's speed with AVX-512.
MOST_TRAINED_GENERIC = 1 << 19


def most_trained() -> int:
    """The multiply-adds of a forward up to which a step of training is one kernel."""
    if _GENERIC:
        return MOST_TRAINED_GENERIC
    return MOST_TRAINED_BY_MKL if _INTEL else MOST_TRAINED


def epilogue_wins(dtype: torch.dtype, activation: str | None, device: torch.device) -> bool:
    """Whether a linear layer whose result is computed in the dtype gains by an activation in the
    same call. Where the product is torch's own, GELU and SiLU do not gain (0.91 to 0.99 on a Xeon):
    torch has made their functions fast. The other activations save a pass that is slow in torch."""
    torchs = _INTEL and device.type == "cpu" and dtype not in (*_LACKING, torch.float64)
    return not torchs or activation not in ("gelu", "silu")


def work_shift(dtype: torch.dtype) -> int:
    """By how many powers of two the limits of small problems are lower than on Zen 4."""
    return 4 if _ZEN5 and dtype == torch.float32 else 0


def lacks_product(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies matrices of the dtype without a library made for this processor."""
    return device.type == "cpu" and dtype in _LACKING


def least_work(dtype: torch.dtype) -> float:
    """The multiply-adds from which the kernels may take a Linear that is computed in the dtype on a
    CPU; infinite where they never do."""
    if dtype in _LACKING or (_ZEN4 and dtype == torch.bfloat16):
        return LEAST_HALF
    return LEAST_FEW if _ZEN4 and dtype == torch.float32 else math.inf


def why_torchs(
    rows: int, n_out: int, n_in: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a Linear with a weight ``[n_out, n_in]``, computed in the dtype, is left to torch's
    product; None where the kernels' is faster. Nothing is computed."""
    if device.type != "cpu":
        return "torch's own product is taken on this device"
    least = least_work(dtype)
    if least == math.inf:
        return why_always_torchs(dtype)
    if dtype == torch.float32 and rows > FEW_ROWS and not _ZEN5:
        least = LEAST_MANY
    if rows * n_out * n_in < least or min(n_out, n_in) < LEAST_WIDTH:
        return (
            f"it is small: the kernels take {dtype} from {least} multiply-adds and "
            f"{LEAST_WIDTH} features on"
        )
    if dtype == torch.float32 and rows < 2:
        return f"torch's product of one row is as fast in {dtype}"
    if dtype not in _LACKING and dtype == torch.bfloat16 and rows > MOST_ROWS:
        return f"torch's product is as fast in {dtype} with more than {MOST_ROWS} rows"
    return None


def why_kernels(dtype: torch.dtype) -> str:
    """Why the kernels take a Linear that ``why_torchs`` has nothing against."""
    if dtype in _LACKING:
        return f"torch has no product in {dtype} for this processor"
    if dtype == torch.float32:
        return "the kernels' product was measured to be faster than MKL's on such processors"
    return f"with up to {MOST_ROWS} rows the kernels' product was measured to be faster"


def why_always_torchs(dtype: torch.dtype) -> str:
    """Why no Linear that is computed in the dtype takes the kernels."""
    return f"on this processor torch's product is as fast in {dtype}"


def why_swap(n_out: int, n_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a Linear of this weight may take the kernels at some call, in its dtype or in that of
    autocast; None where it never does."""
    if dtype == torch.float32 and n_out * n_in < LEAST_WEIGHT:
        return None
    if any(why_torchs(rows, n_out, n_in, dtype, device) is None for rows in (MOST_ROWS, 1 << 12)):
        return why_kernels(dtype)
    for computed in _LACKING if dtype == torch.float32 else ():
        if why_torchs(1 << 12, n_out, n_in, computed, device) is None:
            return f"{why_kernels(computed)}, which autocast may ask for"
    return None


def why_left(n_out: int, n_in: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why ``why_swap`` has no reason."""
    if dtype == torch.float32 and n_out * n_in < LEAST_WEIGHT:
        return f"float32 weights of less than {LEAST_WEIGHT} elements do not repay a swap"
    return why_torchs(1 << 12, n_out, n_in, dtype, device) or ""
