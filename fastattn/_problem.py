"""What a backend must know of a call to say whether it serves the call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Problem(NamedTuple):
    """What a backend must know to say whether it serves a call."""

    op: str
    device: str
    dtype: torch.dtype
    head_dim: int = 0  # the larger of D and Dv
    slopes_gradient: bool = False
    gradient: bool = False  # autograd will ask for one of q, k, v
    extras: tuple[str, ...] = ()  # what cuda does not do; not looked for on other devices
    gpu: int | None = None  # on device "cuda"; None is the current one


def attention_problem(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    **_: object,
) -> Problem:
    """The Problem of an attention call."""
    device = query.device.type
    slopes_gradient = needs_gradient(alibi_slopes)
    head_dim = max(query.shape[-1], value.shape[-1])
    if device != "cuda":
        return Problem(op, device, query.dtype, head_dim, slopes_gradient)
    extras = {
        "dropout": dropout_p > 0.0,
        "softcap": softcap != 0.0,
        "ALiBi slopes": alibi_slopes is not None,
        "scale of 0 or less": scale is not None and not scale > 0.0,
        "head dim of 0": min(query.shape[-1], value.shape[-1]) == 0,
        "extents of 2^29 and more": max(query.shape[-2], key.shape[-2]) >= 2**29
        or math.prod(query.shape[:-2]) >= 2**29,
    }
    if attn_mask is not None:
        over_keys = isinstance(attn_mask, Tensor) and math.prod(attn_mask.shape[-3:-1]) == 1
        extras["float mask"] = attn_mask.dtype != torch.bool
        extras["mask that differs between heads or queries"] = not over_keys
    gradient = any(map(needs_gradient, (query, key, value)))
    against = tuple(name for name, there in extras.items() if there)
    gpu = query.device.index
    return Problem(op, device, query.dtype, head_dim, slopes_gradient, gradient, against, gpu)


def linear_problem(op: str, input: Tensor, weights: Sequence[Tensor]) -> Problem:
    """The Problem of a linear+ReLU or MLP call."""
    device = input.device.type
    if device != "cuda":
        return Problem(op, device, input.dtype)
    tensors = [x for x in (input, *weights) if isinstance(x, Tensor)]
    extras = {
        "sizes of 0": any(x.numel() == 0 for x in tensors),
        "extents of 2^30 and more": any(
            max(math.prod(x.shape[:-1]), *x.shape[-1:]) >= 2**30 for x in tensors if x.dim()
        ),
    }
    against = tuple(name for name, there in extras.items() if there)
    return Problem(op, device, input.dtype, extras=against, gpu=input.device.index)


def rows_problem(op: str, input: Tensor) -> Problem:
    """The Problem of a call of dropout_add_norm, activation_dropout or a linear layer with any
    activation, for which cuda has no kernel."""
    device = input.device
    if device.type != "cuda":
        return Problem(op, device.type, input.dtype)
    return Problem(op, "cuda", input.dtype, extras=("kernel for it",), gpu=device.index)


def autocast_dtype(device: str) -> torch.dtype | None:
    """Autocast's dtype where it is on for the device, else None."""
    # Asking whether it exists costs more than the rest for the two that have it.
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def follows_autocast(x: object) -> bool:
    """Whether autocast changes its dtype."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a call with x is computed."""
    computed = autocast_dtype(x.device.type)
    return computed if computed is not None and follows_autocast(x) else x.dtype


def fused_mlp(weights: Sequence[Tensor]) -> bool:
    """Whether cuda takes all layers of an MLP in one kernel; else it takes one at a time."""
    return len(weights) <= 8 and all(w.shape[0] <= 256 for w in weights)


def needs_gradient(x: Tensor | None) -> bool:
    """Whether autograd will ask for x's gradient."""
    if x is None:
        return False
    return (x.requires_grad and torch.is_grad_enabled()) or _has_tangent(x)


def _has_tangent(x: Tensor) -> bool:
    """Whether forward mode will ask for x's part."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None
