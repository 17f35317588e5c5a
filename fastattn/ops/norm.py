"""Dropout, residual sum and norm in one op: input ``[*, N]``, M rows; weight and bias ``[N]``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn._call import NATIVE
from fastattn.ops import schemas


def dropout_add_norm_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    rms: bool,
    backend: str = NATIVE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm and the sum, ``[*, N]``; mean and 1 / deviation of each row, ``[M]`` in float32
    (float64 for float64).

    The sum has shape ``[0]`` where it is input itself, without residual and dropout; the mean has
    for RMSNorm. ``seed`` is int64 ``[n]``, n a divisor of M: each serves M / n rows.
    """
    args = (input, residual, weight, bias, seed, dropout_p, eps, rms)
    if backend == "triton":
        return torch.ops.fastattn_triton.dropout_add_norm_forward(*args)
    return torch.ops.fastattn.dropout_add_norm_forward(*args)


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
    backend: str = NATIVE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, residual, weight and bias; one that is not needed has shape ``[0]``.
    Without dropout the first two are equal, and a caller that asks for one saves a copy."""
    args = (grad_out, grad_sum, sum, weight, mean, rstd, seed, dropout_p, rms, needs)
    if backend == "triton":
        return torch.ops.fastattn_triton.dropout_add_norm_backward(*args)
    return torch.ops.fastattn.dropout_add_norm_backward(*args)


def _fake_forward(input, residual, weight, bias, seed, dropout_p, eps, rms):
    dtype = input.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = 1
    for extent in input.shape[:-1]:
        rows = rows * extent
    is_input = residual is None and dropout_p == 0.0
    return (
        input.new_empty(input.shape, dtype=dtype),
        input.new_empty((0,) if is_input else input.shape, dtype=dtype),
        input.new_empty((0,) if rms else (rows,), dtype=wide),
        input.new_empty((rows,), dtype=wide),
    )


def _fake_backward(grad_out, grad_sum, sum, weight, mean, rstd, seed, dropout_p, rms, needs):
    vector = (sum.shape[-1],)
    of_weight = sum.dtype if weight is None else weight.dtype
    found = zip((sum.shape, sum.shape, vector, vector),
                (sum.dtype, sum.dtype, of_weight, of_weight), needs, strict=True)  # fmt: skip
    return tuple(sum.new_empty(shape if need else (0,), dtype=kind) for shape, kind, need in found)


for _ns in schemas.NAMESPACES:
    torch.library.register_fake(f"{_ns}::dropout_add_norm_forward", _fake_forward)
    torch.library.register_fake(f"{_ns}::dropout_add_norm_backward", _fake_backward)
