"""Linear+ReLU on a GPU: from tensors to launches, and which products cuBLAS does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastattn.ops.triton import capability, config, flags, interpreting
from fastattn.ops.triton.launch import cdiv, launch
from fastattn.ops.triton.linear_kernels import (
    linear_relu_forward_kernel,
    linear_relu_input_gradient_kernel,
    linear_relu_jvp_kernel,
    linear_relu_weight_gradient_kernel,
    masked_gradient_kernel,
    relu_bits_kernel,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ELEMENT_ROWS, _ELEMENT_COLUMNS = 32, 128  # a tile of the element by element kernels


def _require(good: bool, argument: str, expected: str, got: object) -> None:
    if not good:
        raise RuntimeError(f"{argument}: expected {expected}, got {got}")


def _check(input: Tensor, weight: Tensor) -> None:
    _require(input.dim() >= 1, "input", "at least 1 dimension", tuple(input.shape))
    _require(input.dtype in _DTYPES, "input", "a floating dtype", input.dtype)
    good = weight.dim() == 2 and weight.shape[1] == input.shape[-1]
    _require(good, "weight", f"[N, {input.shape[-1]}]", tuple(weight.shape))
    _require(weight.dtype == input.dtype, "weight", f"dtype {input.dtype}", weight.dtype)
    _require(weight.device == input.device, "weight", f"device {input.device}", weight.device)


def _rows(x: Tensor) -> Tensor:
    """``[M, columns]`` with a unit last stride, a view wherever one exists."""
    x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(math.prod(x.shape[:-1]), 0)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _options(x: Tensor, kernel: str) -> dict:
    wide = x.dtype == torch.float64
    upcast = interpreting() and x.dtype == torch.bfloat16
    if interpreting():
        block = config.INTERPRETED_PRODUCT
    else:
        block = config.product(kernel, capability(x.device.index))
    return {
        "ACC": tl.float64 if wide else tl.float32,
        "FLAGS": flags.UPCAST.value if upcast else 0,
        "BLOCK_M": block.m,
        "BLOCK_N": block.n,
        "BLOCK_K": block.k,
        "num_warps": block.num_warps,
        "num_stages": block.num_stages,
        "device": x.device,
    }


def _grid(options: dict, rows: int, columns: int) -> int:
    return cdiv(rows, options["BLOCK_M"]) * cdiv(columns, options["BLOCK_N"])


def _fused(x: Tensor, m: int, n: int, k: int) -> bool:
    return config.fused_product(m, n, k, x.element_size())


def linear_relu_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out ``[*, N]`` and its bits, uint8 ``[M, ceil(N / 8)]``."""
    _check(input, weight)
    if bias is not None:
        good = bias.shape == weight.shape[:1] and bias.dtype == input.dtype
        _require(good, "bias", f"{input.dtype} [{weight.shape[0]}]", (bias.dtype, bias.shape))
    x, w = _rows(input), _rows(weight)
    (m, k), n = x.shape, w.shape[0]
    bits = torch.empty((m, (n + 7) // 8), dtype=torch.uint8, device=x.device)
    if _fused(x, m, n, k):
        y = x.new_empty((m, n))
        options = _options(x, "forward")
        bias = None if bias is None else bias.contiguous()
        launch(
            linear_relu_forward_kernel,
            (_grid(options, m, n),),
            x,
            w,
            bias,
            y,
            bits,
            x.stride(0),
            w.stride(0),
            m,
            n,
            k,
            **options,
        )
    else:
        y = x @ w.t() if bias is None else torch.addmm(bias, x, w.t())
        launch(
            relu_bits_kernel,
            (cdiv(m, _ELEMENT_ROWS), cdiv(n, _ELEMENT_COLUMNS)),
            y,
            bits,
            m,
            n,
            BLOCK_M=_ELEMENT_ROWS,
            BLOCK_N=_ELEMENT_COLUMNS,
            device=x.device,
        )
    return y.view(*input.shape[:-1], n), bits


def _check_mask(mask: Tensor, m: int, n: int) -> None:
    good = mask.shape == (m, (n + 7) // 8) and mask.dtype == torch.uint8 and mask.is_contiguous()
    _require(good, "mask", f"uint8 {(m, (n + 7) // 8)}", (mask.dtype, tuple(mask.shape)))


def linear_relu_backward(
    grad_out: Tensor, input: Tensor, weight: Tensor, mask: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of input, weight and bias; one that is not needed has shape ``[0]``."""
    _check(input, weight)
    x, w = _rows(input), _rows(weight)
    (m, k), n = x.shape, w.shape[0]
    good = grad_out.shape == (*input.shape[:-1], n) and grad_out.dtype == input.dtype
    _require(good, "grad_out", f"{input.dtype} {(*input.shape[:-1], n)}",
             (grad_out.dtype, tuple(grad_out.shape)))  # fmt: skip
    _check_mask(mask, m, n)
    dy = grad_out.reshape(m, n)  # any strides: often the expanded gradient of a sum
    grads = [input.new_empty((0,)) for _ in range(3)]  # none may be another
    if _fused(x, m, n, k):
        if needs[0]:
            grads[0] = _input_gradient(dy, mask, w, m, n, k).view(input.shape)
        if needs[1] or needs[2]:
            dw, db = _weight_gradient(dy, mask, x, m, n, k)
            grads[1] = dw if needs[1] else grads[1]
            grads[2] = db if needs[2] else grads[2]
        return tuple(grads)
    g, parts = _masked(dy, mask, m, n, needs[2])
    if needs[0]:
        grads[0] = (g @ w).view(input.shape)
    if needs[1]:
        grads[1] = g.t() @ x
    if needs[2]:
        grads[2] = parts.sum(0).to(x.dtype)
    return tuple(grads)


def _masked(dy: Tensor, mask: Tensor, m: int, n: int, bias: bool) -> tuple[Tensor, Tensor]:
    """dY∘R, and with bias what each block of its rows adds up to."""
    g = dy.new_empty((m, n))
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    blocks = cdiv(m, _ELEMENT_ROWS)
    parts = torch.empty((blocks, n) if bias else (0,), dtype=wide, device=dy.device)
    launch(
        masked_gradient_kernel,
        (blocks, cdiv(n, _ELEMENT_COLUMNS)),
        dy,
        mask,
        g,
        parts,
        dy.stride(0),
        dy.stride(1),
        m,
        n,
        BIAS=bias,
        BLOCK_M=_ELEMENT_ROWS,
        BLOCK_N=_ELEMENT_COLUMNS,
        device=dy.device,
    )
    return g, parts


def linear_relu_jvp(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    t_input: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
) -> Tensor:
    """The tangent of the output ``[*, N]``, E17; at least one of the three is there."""
    _check(input, weight)
    x, w = _rows(input), _rows(weight)
    (m, k), n = x.shape, w.shape[0]
    _check_mask(mask, m, n)
    tangents = {
        "t_input": (t_input, input.shape),
        "t_weight": (t_weight, weight.shape),
        "t_bias": (t_bias, weight.shape[:1]),
    }
    for name, (tangent, shape) in tangents.items():
        good = tangent is None or (tangent.shape == shape and tangent.dtype == input.dtype)
        _require(good, name, f"{input.dtype} {tuple(shape)}", tangent)
    good = any(tangent is not None for tangent, _ in tangents.values())
    _require(good, "t_input", "at least one tangent", None)
    t_x = None if t_input is None else _rows(t_input)
    t_w = None if t_weight is None else _rows(t_weight)
    t_y: Any
    if t_x is None and t_w is None and t_bias is not None:
        t_y = _masked(t_bias.expand(m, n), mask, m, n, False)[0]
    elif _fused(x, m, n, k):
        t_y = x.new_empty((m, n))
        options = _options(x, "jvp")
        t_bias = None if t_bias is None else t_bias.contiguous()
        launch(
            linear_relu_jvp_kernel,
            (_grid(options, m, n),),
            x,
            w,
            t_x,
            t_w,
            t_bias,
            mask,
            t_y,
            x.stride(0),
            w.stride(0),
            None if t_x is None else t_x.stride(0),
            None if t_w is None else t_w.stride(0),
            m,
            n,
            k,
            **options,
        )
    else:
        t_y = t_bias  # a row that addmm adds to every row
        for a, b in ((t_x, w), (x, t_w)):
            if a is not None and b is not None:
                t_y = a @ b.t() if t_y is None else torch.addmm(t_y, a, b.t())
        t_y = _masked(t_y, mask, m, n, False)[0]
    return t_y.view(*input.shape[:-1], n)


def _input_gradient(dy: Tensor, mask: Tensor, w: Tensor, m: int, n: int, k: int) -> Tensor:
    dx = w.new_empty((m, k))
    options = _options(w, "input_gradient")
    launch(
        linear_relu_input_gradient_kernel,
        (_grid(options, m, k),),
        dy,
        mask,
        w,
        dx,
        dy.stride(0),
        dy.stride(1),
        w.stride(0),
        m,
        n,
        k,
        **options,
    )
    return dx


def _weight_gradient(
    dy: Tensor, mask: Tensor, x: Tensor, m: int, n: int, k: int
) -> tuple[Tensor, Tensor]:
    """dW and db. Few tiles are worked on in parts of the rows, added up in order."""
    options = _options(x, "weight_gradient")
    tiles = _grid(options, n, k)
    depth = options["BLOCK_K"]
    parts = max(1, min(config.WANTED_PROGRAMS // max(1, tiles), cdiv(m, 4 * depth)))
    share = cdiv(cdiv(m, parts), depth) * depth
    parts = cdiv(m, share) if share else 1
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = x.dtype if parts == 1 else wide
    dw = torch.empty((parts, n, k), dtype=dtype, device=x.device)
    db = torch.empty((parts, n), dtype=dtype, device=x.device)
    launch(
        linear_relu_weight_gradient_kernel,
        (tiles, parts),
        dy,
        mask,
        x,
        dw,
        db,
        dy.stride(0),
        dy.stride(1),
        x.stride(0),
        m,
        n,
        k,
        share,
        **options,
    )
    if k == 0:
        db.zero_()
    if parts == 1:
        return dw[0], db[0]
    return dw.sum(0).to(x.dtype), db.sum(0).to(x.dtype)
