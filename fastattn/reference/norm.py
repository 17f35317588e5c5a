"""Dropout, the residual sum and the norm after it, E18-E20."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.reference.philox import philox_keep_mask


def keep_factor(like: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    """Z of E18: the keep-mask of ``like``'s elements over 1 - p, or None without dropout.

    Args:
        like: ``[*, N]``, M rows in all.
        seed: int64 ``[n]``, n a divisor of M; each serves M / n rows that follow each other.
        dropout_p: probability of dropping an element.

    >>> keep_factor(torch.zeros(2, 4), None, 0.0) is None
    True
    """
    if dropout_p == 0.0 or seed is None:
        return None
    width = like.shape[-1]
    rows, parts = math.prod(like.shape[:-1]), seed.numel()
    keep = philox_keep_mask(seed, parts, 1, rows // max(1, parts), width, dropout_p, like.device)
    return keep.view(like.shape).to(like.dtype) / (1.0 - dropout_p)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def dropout_add_norm(
    input: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """norm(residual + dropout(input)) and the sum itself, E18, differentiable by autograd.

    Args:
        input: ``[*, N]``.
        residual: of input's shape, or None for 0.
        weight: ``[N]``, or None for 1.
        bias: ``[N]``, or None for 0.
        seed: dropout's seeds, see ``keep_factor``.
        dropout_p: probability of dropping an element of input.
        eps: is added to the variance.
        rms: RMSNorm, which takes no mean off, in place of LayerNorm.

    Returns:
        The norm and the sum, both of the dtype to which input and residual promote.

    >>> out, total = dropout_add_norm(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2))
    >>> total
    tensor([[2., 4.]])
    """
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    total, factor = _wide(input), keep_factor(_wide(input), seed, dropout_p)
    if factor is not None:
        total = total * factor
    if residual is not None:
        total = total + residual
    total = total.to(dtype)  # the norm is that of the sum as it is kept
    return norm(total, weight, bias, eps=eps, rms=rms), total


def norm(
    total: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, rms: bool
) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension.

    >>> norm(torch.tensor([[1.0, 3.0]]), None, None, eps=0.0, rms=False)
    tensor([[-1.,  1.]])
    """
    z = _wide(total)
    if not rms:
        z = z - z.mean(-1, keepdim=True)
    out = z * torch.rsqrt((z * z).mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out.to(total.dtype)


def dropout_add_norm_backward(
    grad_out: Tensor | None,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, residual, weight and bias, E19, from the sum ``total``.

    Args:
        grad_out: the cotangent of the norm, or None for 0.
        grad_sum: the cotangent of the sum, or None for 0.
        total: the sum, ``[*, N]``.
        weight: as in the forward.
        seed: as in the forward.
        dropout_p: as in the forward.
        eps: as in the forward.
        rms: as in the forward.

    >>> grads = dropout_add_norm_backward(torch.ones(2, 4), None, torch.randn(2, 4), None)
    >>> grads[3]
    tensor([2., 2., 2., 2.])
    """
    z = _wide(total)
    centred = z if rms else z - z.mean(-1, keepdim=True)
    scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    normal = centred * scale  # ẑ
    dy = torch.zeros_like(z) if grad_out is None else grad_out.to(z.dtype)
    g = dy if weight is None else dy * weight
    dz = g - normal * (g * normal).mean(-1, keepdim=True)
    if not rms:
        dz = dz - g.mean(-1, keepdim=True)
    dz = dz * scale
    if grad_sum is not None:
        dz = dz + grad_sum
    factor = keep_factor(z, seed, dropout_p)
    rows = tuple(range(z.dim() - 1))
    dw, db = ((x if not rows else x.sum(rows)) for x in (dy * normal, dy))
    return dz if factor is None else dz * factor, dz, dw, db


def dropout_add_norm_jvp(
    total: Tensor,
    weight: Tensor | None,
    t_total: Tensor,
    t_weight: Tensor | None = None,
    t_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = False,
) -> Tensor:
    """The norm's tangent, E20, from the sum ``total`` and its tangent tr + Z∘tx.

    Args:
        total: the sum, ``[*, N]``.
        weight: as in the forward.
        t_total: the sum's tangent, ``[*, N]``.
        t_weight: the tangent of weight, or None for 0.
        t_bias: the tangent of bias, or None for 0.
        eps: as in the forward.
        rms: as in the forward.

    >>> z = torch.tensor([[1.0, 3.0]])
    >>> dropout_add_norm_jvp(z, None, torch.ones(1, 2), eps=0.0)
    tensor([[0., 0.]])
    """
    z, t = _wide(total), _wide(t_total)
    centred = z if rms else z - z.mean(-1, keepdim=True)
    scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    normal = centred * scale
    if not rms:
        t = t - t.mean(-1, keepdim=True)
    t = (t - normal * (t * normal).mean(-1, keepdim=True)) * scale
    out = t if weight is None else t * weight
    if t_weight is not None:
        out = out + normal * t_weight
    if t_bias is not None:
        out = out + t_bias
    return out
