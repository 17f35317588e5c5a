"""norm(residual + dropout(x)): the user's function and its autograd Function."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import backends, ops, reference
from fastattn.functional import _validate
from fastattn.functional._autograd import (
    apply,
    is_batched_gradient,
    kernel,
    may_be_differentiated,
    transforming,
    without_autocast,
)


class DropoutAddNormFunction(torch.autograd.Function):
    """The norm of residual + dropout(input) and the sum, E18, as an autograd Function.

    Saves the sum, weight and two numbers a row; no dropout mask. The backward is one pass by the
    kernels, E19. A backward that is differentiated is made of torch's operations. Forward mode and
    torch.func do not come here: ``fastattn.dropout_add_norm`` calls torch's operations for them.

    Args of ``apply``, all by position:
        input: ``[*, N]``, M rows.
        residual: None, or of input's shape and dtype.
        weight: None, or ``[N]`` of input's dtype or of float32 (float64 for float64).
        bias: the same.
        seed: None, or dropout's seeds, int64 ``[n]``, n a divisor of M.
        dropout_p: probability in [0, 1) of dropping an element of input.
        eps: is added to the variance.
        rms: RMSNorm in place of LayerNorm.
        backend: ``"native"`` (default), the C++ kernels, or ``"triton"``.

    Returns:
        The norm; the sum, of shape ``[0]`` where it is input itself; mean and 1 / deviation of the
        rows.

    Raises:
        RuntimeError: a kernel refuses an argument.

    >>> import torch
    >>> from fastattn.functional import DropoutAddNormFunction
    >>> x, residual = torch.randn(4, 8), torch.randn(4, 8)
    >>> out, total, mean, rstd = DropoutAddNormFunction.apply(
    ...     x, residual, None, None, None, 0.0, 1e-5, False
    ... )
    >>> torch.equal(total, x + residual)
    True
    """

    @staticmethod
    def forward(input, residual, weight, bias, seed, dropout_p, eps, rms, backend=ops.NATIVE):
        return kernel(
            ops.dropout_add_norm_forward,
            input, residual, weight, bias, seed, dropout_p, eps, rms, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        input, residual, weight, bias, seed, ctx.dropout_p, ctx.eps, ctx.rms, *backend = inputs
        _, total, mean, rstd = output
        ctx.backend = backend[0] if backend else ops.NATIVE
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if residual is None and ctx.dropout_p == 0.0:
            ctx.mark_non_differentiable(total, mean, rstd)
            total = input
        else:
            ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(total, weight, mean, rstd, seed)

    @staticmethod
    def backward(ctx, grad_out, grad_sum, _grad_mean, _grad_rstd):
        given = grad_sum if grad_out is None else grad_out
        if given is None:
            return (None,) * 9
        total, weight, mean, rstd, seed = ctx.saved_tensors
        needs, p = ctx.needs_input_grad[:4], ctx.dropout_p
        if may_be_differentiated() or is_batched_gradient(given):
            options = {"dropout_p": p, "eps": ctx.eps, "rms": ctx.rms}
            with without_autocast(total):
                grads = reference.dropout_add_norm_backward(
                    grad_out, grad_sum, total, weight, seed, **options
                )
            grads = [g.to(total.dtype) for g in grads[:2]] + list(grads[2:])
        else:
            # Without dropout the gradients of input and residual are one tensor.
            asked = [needs[0] and p > 0.0, needs[1] or (needs[0] and p == 0.0), *needs[2:]]
            grads = list(
                kernel(
                    ops.dropout_add_norm_backward,
                    grad_out, grad_sum, total, weight, mean, rstd, seed, p, ctx.rms, asked,
                    ctx.backend,
                )
            )  # fmt: skip
            if p == 0.0:
                grads[0] = grads[1]
        dtypes = (total.dtype, total.dtype, None if weight is None else weight.dtype,
                  ctx.bias_dtype)  # fmt: skip
        return (
            *(g.to(dtype) if need else None
              for g, dtype, need in zip(grads, dtypes, needs, strict=True)),
            *[None] * 5,
        )  # fmt: skip


@overload
def dropout_add_norm(
    input: Tensor,
    residual: Tensor | None = ...,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    dropout_p: float = ...,
    eps: float | None = ...,
    *,
    kind: Literal["layer", "rms"] = ...,
    prenorm: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def dropout_add_norm(
    input: Tensor,
    residual: Tensor | None = ...,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    dropout_p: float = ...,
    eps: float | None = ...,
    *,
    kind: Literal["layer", "rms"] = ...,
    prenorm: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def dropout_add_norm(
    input: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float | None = None,
    *,
    kind: Literal["layer", "rms"] = "layer",
    prenorm: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(residual + dropout(input)), in one pass forward and one pass backward.

    The norm is LayerNorm (Ba et al. 2016, arXiv 1607.06450) or RMSNorm (Zhang and Sennrich 2019,
    arXiv 1910.07467) over the last dimension. No dropout mask is stored.

    Args:
        input: ``[..., N]``, floating point.
        residual: of input's shape, or None for 0. Where its dtype is another, both are promoted.
        weight: ``[N]``, or None for 1; of the sum's dtype or of float32.
        bias: ``[N]``, or None for 0; of weight's dtype.
        dropout_p: probability in [0, 1] of dropping an element of input; applied whenever it is
            above 0, training or not.
        eps: is added to the variance. None: 1e-5; for RMSNorm the dtype's epsilon, as in torch.
        kind: ``"layer"`` or ``"rms"``.
        prenorm: return the sum as well, for blocks that normalise their input.
        backend: ``cpu``, ``triton``, ``reference``, or None for the first that serves the call.

    Returns:
        ``[..., N]`` in the dtype to which input and residual promote; with ``prenorm`` the pair
        (norm, residual + dropout(input)). A NaN stays in its row.

    Raises:
        ValueError: a shape, device or number that does not fit; an unknown ``kind``.
        TypeError: a dtype or type that does not fit.
        RuntimeError: ``backend`` names one that cannot serve the call.

    >>> import torch, fastattn
    >>> input, residual, weight, bias = *torch.randn(2, 4, 8), torch.ones(8), torch.zeros(8)
    >>> out = fastattn.dropout_add_norm(input, residual, weight, bias)
    >>> expected = torch.nn.functional.layer_norm(input + residual, (8,), weight, bias)
    >>> torch.allclose(out, expected, atol=1e-5)
    True
    """
    _validate.tensor("input", input)
    dropout_p = _validate.probability("dropout_p", dropout_p)
    input, residual, weight, bias = _promoted(input, residual, weight, bias)
    _validate.norm(input, residual, weight, bias)
    if kind not in ("layer", "rms"):
        raise ValueError(f"kind: expected 'layer' or 'rms', got {kind!r}")
    rms = kind == "rms"
    if eps is None:
        eps = torch.finfo(input.dtype).eps if rms else 1e-5
    eps = _validate.number("eps", eps)
    chosen = backends.select(backends.rows_problem("dropout_add_norm", input), backend)
    seed = None
    if dropout_p == 1.0:
        input, dropout_p = input * 0.0, 0.0  # NaN stays, and the gradients are 0, as in torch
    elif dropout_p > 0.0:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=input.device)
    if chosen == "reference" or transforming():
        out, total = reference.dropout_add_norm(
            input, residual, weight, bias, seed, dropout_p=dropout_p, eps=eps, rms=rms
        )
        return (out, total) if prenorm else out
    args = (seed, dropout_p, eps, rms, backends.kernels_of(chosen))
    out, total, *_ = apply(DropoutAddNormFunction, input, residual, weight, bias, *args)
    if not prenorm:
        return out
    return out, input if residual is None and dropout_p == 0.0 else total


def _promoted(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Any, ...]:
    """The tensors in the dtypes of torch's operations: under CUDA's autocast norms are computed in
    float32, and a sum has the dtype to which its terms promote."""
    tensors = (input, residual, weight, bias)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        return tuple(
            x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x
            for x in tensors
        )
    if not isinstance(residual, Tensor) or residual.dtype == input.dtype:
        return tensors
    if not residual.dtype.is_floating_point:
        return tensors  # the checks refuse it
    dtype = torch.promote_types(input.dtype, residual.dtype)
    return input.to(dtype), residual.to(dtype), weight, bias
