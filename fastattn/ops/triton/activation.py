"""An activation and dropout on a GPU: from tensors to launches. Memory bounds the kernel: it reads
an element, the gradient two, and writes one."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops.triton import config
from fastattn.ops.triton.activation_kernels import activation_kernel
from fastattn.ops.triton.launch import cdiv, launch
from fastattn.ops.triton.problem import require
from fastattn.ops.triton.rows import as_rows, check, check_first, dropout_of, optional_rows, options

_KINDS = 7


def activation_forward(
    input: Tensor, activation: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Z∘f(x)."""
    return _activation("activation_forward", None, input, activation, dropout_p, seed)


def activation_backward(
    grad_out: Tensor, input: Tensor, activation: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """dy∘Z∘f'(x)."""
    return _activation("activation_backward", grad_out, input, activation, dropout_p, seed)


def _activation(
    op: str,
    grad_out: Tensor | None,
    input: Tensor,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    check_first(op, "input", input)
    check(op, "grad_out", grad_out, input.shape, (input.dtype,), input.device)
    require(0 <= activation < _KINDS, f"{op}: activation", f"a number below {_KINDS}", activation)
    dy, stride_dy = optional_rows(grad_out)
    # Without an activation only input's shape counts for the gradient.
    x = as_rows(input) if dy is None or activation != 0 else dy
    m, n = x.shape
    seeds = dropout_of(op, seed, dropout_p, m, x.device)
    out = input.new_empty(input.shape)
    block = config.ACTIVATION
    launch(
        activation_kernel,
        # One dimension: a grid has at most 65535 programs along any other.
        (cdiv(m, block.rows) * cdiv(n, block.columns),),
        x,
        dy,
        seeds[0],
        out,
        x.stride(0),
        stride_dy,
        m,
        n,
        *seeds[1:],
        KIND=activation,
        **options(x, block),
    )
    return out
