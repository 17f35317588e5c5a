"""Matrices of rows on a GPU, and dropout of their elements: what launches check and pass on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastattn.ops.triton import config
from fastattn.ops.triton.problem import require

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulator's dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_first(op: str, name: str, x: Tensor) -> None:
    require(x.dim() >= 1, f"{op}: {name}", "at least 1 dimension [*, N]", tuple(x.shape))
    require(x.dtype in _DTYPES, f"{op}: {name}",
            "float32, float64, bfloat16 or float16", x.dtype)  # fmt: skip


def check(
    op: str,
    name: str,
    x: Tensor | None,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    if x is None:
        return
    require(x.shape == tuple(shape), f"{op}: {name}", f"shape {tuple(shape)}", tuple(x.shape))
    expected = " or ".join(map(str, dict.fromkeys(dtypes)))
    require(x.dtype in dtypes, f"{op}: {name}", expected, x.dtype)
    require(x.device == device, f"{op}: {name}", f"device {device}", x.device)


def as_rows(x: Tensor) -> Tensor:
    """``[M, N]`` with a unit last stride, a view wherever one exists."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def optional_rows(x: Tensor | None) -> tuple[Tensor | None, int | None]:
    """The rows and their stride."""
    if x is None:
        return None, None
    x = as_rows(x)
    return x, x.stride(0)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def dropout_of(
    op: str, seed: Tensor | None, p: float, rows: int, device: torch.device
) -> tuple[Tensor | None, int | None, int | None, float]:
    """The seeds, the rows of each, the least random word that keeps an element, 1 / (1 - p)."""
    require(0 <= p < 1, f"{op}: dropout_p", "a probability in [0, 1)", p)
    if p == 0:
        return None, None, None, 1.0
    expected = f"int64 [n] on {device} with n a divisor of the {rows} rows"
    if seed is None:
        raise RuntimeError(f"{op}: seed: expected {expected}, got None")
    good = seed.dtype == torch.int64 and seed.device == device and seed.dim() == 1
    good = good and seed.numel() > 0 and rows % seed.numel() == 0
    require(good, f"{op}: seed", expected, (seed.dtype, tuple(seed.shape), seed.device))
    return seed.contiguous(), rows // seed.numel(), math.floor(p * 2**32), 1.0 / (1.0 - p)


def options(x: Tensor, block: config.Block) -> dict:
    return {
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "BLOCK_M": block.rows,
        "BLOCK_N": block.columns,
        "num_warps": block.num_warps,
        "device": x.device,
    }
