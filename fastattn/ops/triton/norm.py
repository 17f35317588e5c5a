"""Dropout, residual sum and norm on a GPU: from tensors to launches.

Memory bounds both kernels. By design the forward reads two elements and writes two for each of
input, and so does the backward: ``[8192, 4096]`` in bfloat16 is 268 MB, 80 us at an H100's 3.35
TB/s. This is an estimate, not a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from fastattn.ops.triton.rows import (
    as_rows,
    check,
    check_first,
    contiguous,
    dropout_of,
    optional_rows,
    options,
    wide_dtype,
)

_FORWARD, _BACKWARD = "dropout_add_norm_forward", "dropout_add_norm_backward"


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
    check_first(_FORWARD, "input", input)
    wide = wide_dtype(input.dtype)
    vectors = (input.dtype, wide)
    check(_FORWARD, "residual", residual, input.shape, (input.dtype,), input.device)
    check(_FORWARD, "weight", weight, input.shape[-1:], vectors, input.device)
    check(_FORWARD, "bias", bias, input.shape[-1:], vectors, input.device)
    x, (r, stride_r) = as_rows(input), optional_rows(residual)
    m, n = x.shape
    seeds = dropout_of(_FORWARD, seed, dropout_p, m, x.device)
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
        contiguous(weight),
        contiguous(bias),
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
        **options(x, block),
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
    check_first(_BACKWARD, "sum", sum)
    wide, device = wide_dtype(sum.dtype), sum.device
    check(_BACKWARD, "grad_out", grad_out, sum.shape, (sum.dtype,), device)
    check(_BACKWARD, "grad_sum", grad_sum, sum.shape, (sum.dtype,), device)
    good = grad_out is not None or grad_sum is not None
    require(good, f"{_BACKWARD}: grad_out", "a tensor, as grad_sum is None", None)
    check(_BACKWARD, "weight", weight, sum.shape[-1:], (sum.dtype, wide), device)
    z = as_rows(sum)
    m, n = z.shape
    check(_BACKWARD, "mean", mean, (0,) if rms else (m,), (wide,), device)
    check(_BACKWARD, "rstd", rstd, (m,), (wide,), device)
    seeds = dropout_of(_BACKWARD, seed, dropout_p, m, device)

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
    dy, stride_dy = optional_rows(grad_out)
    dsum, stride_dsum = optional_rows(grad_sum)
    whole = config.norm("backward", n, wide.itemsize)
    block = whole or config.NORM_COLUMN_SUMS
    share = _share(m, n, block)
    shares = cdiv(m, share)
    parts = [z.new_empty((shares, n), dtype=wide) if need else None for need in needs[2:]]
    means = None if rms else mean.contiguous()
    inputs = (dy, dsum, z, contiguous(weight), means, rstd.contiguous(), seeds[0])
    strides = (stride_dy, stride_dsum, z.stride(0))
    if not whole and any(needs[:2]):
        row = config.WIDE_NORM
        launch(norm_backward_wide_kernel, (cdiv(m, row.rows),), *inputs, dx, dr, *strides, m, n,
               *seeds[1:], **options(z, row))  # fmt: skip
    if any(needs[2:]) or (whole and any(needs)):
        of_rows = (dx, dr) if whole else (None, None)
        launch(norm_backward_kernel, (shares, cdiv(n, block.columns)), *inputs, *of_rows, *parts,
               *strides, m, n, share, *seeds[1:], **options(z, block))  # fmt: skip
    if any(needs[2:]):
        last = config.NORM_SHARES
        launch(norm_add_shares_kernel, (cdiv(n, last.columns),), *parts, dw, db, shares, n,
               **options(z, last))  # fmt: skip
    return grads


def _share(m: int, n: int, block: config.Block) -> int:
    """How many rows a program of the backward walks, from M and N alone, so that every GPU adds in
    the same order."""
    programs = 8 * config.WANTED_PROGRAMS // block.num_warps
    shares = max(1, programs // max(1, cdiv(n, block.columns)))
    rows = min(max(cdiv(m, shares), 4), config.NORM_STEPS * block.rows)
    return cdiv(rows, block.rows) * block.rows
