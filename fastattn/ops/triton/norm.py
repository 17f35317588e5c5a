"""Dropout, residual sum and norm on a GPU: from tensors to launches.

Memory bounds both kernels. By design the forward reads two elements and writes two for each of
input, and so does the backward: ``[8192, 4096]`` in bfloat16 is 268 MB, 80 us at an H100's 3.35
TB/s. This is an estimate, not a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastattn.ops.triton import config
from fastattn.ops.triton.launch import cdiv, launch
from fastattn.ops.triton.norm_kernels import (
    norm_add_shares_kernel,
    norm_backward_kernel,
    norm_backward_wide_kernel,
    norm_forward_kernel,
    norm_forward_wide_kernel,
)
from fastattn.ops.triton.problem import require

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FORWARD, _BACKWARD = "dropout_add_norm_forward", "dropout_add_norm_backward"


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The accumulator's dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_first(op: str, name: str, x: Tensor) -> None:
    require(x.dim() >= 1, f"{op}: {name}", "at least 1 dimension [*, N]", tuple(x.shape))
    require(x.dtype in _DTYPES, f"{op}: {name}",
            "float32, float64, bfloat16 or float16", x.dtype)  # fmt: skip


def _check(
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


def _rows(x: Tensor) -> Tensor:
    """``[M, N]`` with a unit last stride, a view wherever one exists."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _optional_rows(x: Tensor | None) -> tuple[Tensor | None, int | None]:
    """The rows and their stride."""
    if x is None:
        return None, None
    x = _rows(x)
    return x, x.stride(0)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _dropout(
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


def _options(x: Tensor, block: config.Block) -> dict:
    return {
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "BLOCK_M": block.rows,
        "BLOCK_N": block.columns,
        "num_warps": block.num_warps,
        "device": x.device,
    }


def dropout_add_norm_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm, the sum, mean and σ⁻¹ of each row. The sum has shape ``[0]`` where it is input
    itself, the mean has for RMSNorm."""
    _check_first(_FORWARD, "input", input)
    wide = _wide(input.dtype)
    vectors = (input.dtype, wide)
    _check(_FORWARD, "residual", residual, input.shape, (input.dtype,), input.device)
    _check(_FORWARD, "weight", weight, input.shape[-1:], vectors, input.device)
    _check(_FORWARD, "bias", bias, input.shape[-1:], vectors, input.device)
    x, (r, stride_r) = _rows(input), _optional_rows(residual)
    m, n = x.shape
    seeds = _dropout(_FORWARD, seed, dropout_p, m, x.device)
    is_input = residual is None and dropout_p == 0
    out = input.new_empty(input.shape)
    total = input.new_empty((0,) if is_input else input.shape)
    mean = input.new_empty((0,) if rms else (m,), dtype=wide)
    rstd = input.new_empty((m,), dtype=wide)
    whole = config.norm("forward", n, wide.itemsize)
    block = whole or config.WIDE_NORM
    launch(
        norm_forward_kernel if whole else norm_forward_wide_kernel,
        (cdiv(m, block.rows),),
        x,
        r,
        _contiguous(weight),
        _contiguous(bias),
        seeds[0],
        out,
        None if is_input else total,
        None if rms else mean,
        rstd,
        x.stride(0),
        stride_r,
        m,
        n,
        *seeds[1:],
        eps,
        **_options(x, block),
    )
    return out, total, mean, rstd


def dropout_add_norm_backward(
    grad_out: Tensor | None,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    rms: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of input, residual, weight and bias; one that is not needed has shape ``[0]``."""
    _check_first(_BACKWARD, "sum", sum)
    wide, device = _wide(sum.dtype), sum.device
    _check(_BACKWARD, "grad_out", grad_out, sum.shape, (sum.dtype,), device)
    _check(_BACKWARD, "grad_sum", grad_sum, sum.shape, (sum.dtype,), device)
    good = grad_out is not None or grad_sum is not None
    require(good, f"{_BACKWARD}: grad_out", "a tensor, as grad_sum is None", None)
    _check(_BACKWARD, "weight", weight, sum.shape[-1:], (sum.dtype, wide), device)
    z = _rows(sum)
    m, n = z.shape
    _check(_BACKWARD, "mean", mean, (0,) if rms else (m,), (wide,), device)
    _check(_BACKWARD, "rstd", rstd, (m,), (wide,), device)
    seeds = _dropout(_BACKWARD, seed, dropout_p, m, device)

    of_weight = sum.dtype if weight is None else weight.dtype
    shapes = (sum.shape, sum.shape, (n,), (n,))
    dtypes = (sum.dtype, sum.dtype, of_weight, of_weight)
    grads = tuple(
        sum.new_empty(shape if need else (0,), dtype=dtype)  # none may be another
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )
    if grad_out is None:  # no column of it is added up
        for grad in grads[2:]:
            grad.zero_()
        needs = (*needs[:2], False, False)
    dx, dr, dw, db = (x if need else None for x, need in zip(grads, needs, strict=True))
    dy, stride_dy = _optional_rows(grad_out)
    dsum, stride_dsum = _optional_rows(grad_sum)
    whole = config.norm("backward", n, wide.itemsize)
    block = whole or config.NORM_COLUMN_SUMS
    share = _share(m, n, block)
    shares = cdiv(m, share)
    parts = [z.new_empty((shares, n), dtype=wide) if need else None for need in needs[2:]]
    means = None if rms else mean.contiguous()
    inputs = (dy, dsum, z, _contiguous(weight), means, rstd.contiguous(), seeds[0])
    strides = (stride_dy, stride_dsum, z.stride(0))
    if not whole and any(needs[:2]):
        row = config.WIDE_NORM
        launch(norm_backward_wide_kernel, (cdiv(m, row.rows),), *inputs, dx, dr, *strides, m, n,
               *seeds[1:], **_options(z, row))  # fmt: skip
    if any(needs[2:]) or (whole and any(needs)):
        of_rows = (dx, dr) if whole else (None, None)
        launch(norm_backward_kernel, (shares, cdiv(n, block.columns)), *inputs, *of_rows, *parts,
               *strides, m, n, share, *seeds[1:], **_options(z, block))  # fmt: skip
    if any(needs[2:]):
        last = config.NORM_SHARES
        launch(norm_add_shares_kernel, (cdiv(n, last.columns),), *parts, dw, db, shares, n,
               **_options(z, last))  # fmt: skip
    return grads


def _share(m: int, n: int, block: config.Block) -> int:
    """How many rows a program of the backward walks, from M and N alone, so that every GPU adds in
    the same order."""
    programs = 8 * config.WANTED_PROGRAMS // block.num_warps
    shares = max(1, programs // max(1, cdiv(n, block.columns)))
    rows = min(max(cdiv(m, shares), 4), config.NORM_STEPS * block.rows)
    return cdiv(rows, block.rows) * block.rows
