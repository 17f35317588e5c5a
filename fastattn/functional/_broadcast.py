"""Turns shapes that only torch's attention takes into shapes that the kernels take."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.functional._validate import heads


def broadcast(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Valid inputs as ``[*, H, Sq, D]``, ``[*, Hk, Sk, D]``, ``[*, Hk, Sk, Dv]`` with Hk a divisor
    of H. They are views, except where different numbers of query heads share key and value."""
    if query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.dim() > 2:
        return query, key, value
    heads_q, heads_k, heads_v = map(heads, (query, key, value))
    if enable_gqa and heads_k != heads_v:
        both = math.lcm(heads_k, heads_v)
        key, value = _shared(key, both // heads_k), _shared(value, both // heads_v)
        heads_k = both
    elif not enable_gqa:
        (heads_q,) = torch.broadcast_shapes((heads_q,), (heads_k,), (heads_v,))
        if not heads_k == heads_v == 1 or heads_q == 0:  # one head for all is the kernels' own
            heads_k = heads_q
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))

    def expanded(x: Tensor, n: int) -> Tensor:
        return x.expand(*batch, n, *x.shape[-2:])

    return expanded(query, heads_q), expanded(key, heads_k), expanded(value, heads_k)


def _shared(x: Tensor, by: int) -> Tensor:
    """x with each head repeated ``by`` times."""
    if by == 1:
        return x
    one = heads(x) == 1
    return x.expand(*x.shape[:-3], by, *x.shape[-2:]) if one else x.repeat_interleave(by, -3)


def padded_head_dim(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key with a head dim of 0, at which every score is 0, padded to 1."""
    if query.shape[-1] > 0:
        return query, key
    return F.pad(query, (0, 1)), F.pad(key, (0, 1))
