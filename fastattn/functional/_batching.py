"""vmap: the mapped dimension becomes a batch dimension of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_MOST_DIMS = 9  # of the kernels: 6 batch dimensions, heads, rows, columns


# The kind of each tensor argument of a Function, in the order of ``fastattn._call``.
# AttentionDerivative has groups of four tangents after these.
_INPUTS = ("rows", "rows", "rows", "mask")
_EXTRAS = ("slopes", "seed", "starts", "starts")
FORWARD = (*_INPUTS, *_EXTRAS)
DERIVATIVE = ("rows", "statistics", *FORWARD, "rows", "statistics", "statistics")


def attention(
    call: Callable[..., Sequence[Tensor]],
    size: int,
    tensors: Sequence[Any],  # Tensor | None
    in_dims: Sequence[int | None],
    kinds: Sequence[str],
    *,
    whole_mask: bool,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """``call(*tensors)`` once for all ``size`` elements of the mapped dimension, and the place of
    that dimension in each result.

    Args:
        kinds: FORWARD or DERIVATIVE.
        whole_mask: the mask's gradient is a result, so that each element needs a mask of its own.
    """
    kinds = (*kinds, *_INPUTS * ((len(tensors) - len(kinds)) // 4))
    at = kinds.index("mask")
    # A mask and its tangents keep one shape.
    masks = [dim for dim, kind in zip(in_dims, kinds, strict=True) if kind == "mask"]
    fold = _Leading(size, whole_mask or any(dim is not None for dim in masks))
    if any(x is not None for x, kind in zip(tensors, kinds, strict=True) if kind == "starts"):
        # The queries stand three places before the mask, the keys two.
        tokens = [_lead(tensors[n], in_dims[n], size).shape[-2] for n in (at - 3, at - 2)]
        fold = _Packed(size, tokens)
    folded = [
        None if x is None else getattr(fold, kind)(x, dim)
        for x, dim, kind in zip(tensors, in_dims, kinds, strict=True)
    ]
    return fold.results(call(*folded))


class _Leading:
    """The mapped dimension is put in front: ``[N, *batch, H, S, D]``."""

    def __init__(self, size: int, whole_mask: bool) -> None:
        self.size, self.whole_mask = size, whole_mask
        self.merged: int | None = None

    def rows(self, x: Tensor, dim: int | None) -> Tensor:
        return self._merge(_lead(x, dim, self.size), _MOST_DIMS)

    def statistics(self, x: Tensor, dim: int | None) -> Tensor:
        return self._merge(_lead(x, dim, self.size), _MOST_DIMS - 1)

    def mask(self, x: Tensor, dim: int | None) -> Tensor:
        if dim is None and not self.whole_mask and x.dim() < _MOST_DIMS:
            return x[None]
        x = _lead(x, dim, self.size)
        if x.dim() > _MOST_DIMS and self.merged is not None:
            x = x.expand(x.shape[0], self.merged, *x.shape[2:])
        return self._merge(x, _MOST_DIMS)

    def seed(self, x: Tensor, dim: int | None) -> Tensor:
        return _lead(x, dim, self.size).reshape(-1)

    def slopes(self, x: Tensor, dim: int | None) -> Tensor:
        if dim is None and x.dim() == 1:
            return x
        x = _lead(x, dim, self.size)
        return x.reshape(-1, x.shape[-1])

    def _merge(self, x: Tensor, most: int) -> Tensor:
        if x.dim() <= most:
            return x
        self.merged = x.shape[1]
        return x.flatten(0, 1)

    def results(self, results: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if self.merged is not None:
            results = [x.unflatten(0, (self.size, self.merged)) for x in results]
        return tuple(results), (0,) * len(results)


class _Packed(_Leading):
    """The mapped dimension joins the tokens, ``[1, H, N * tokens, D]``: N times as many
    sequences."""

    def __init__(self, size: int, tokens: list[int]) -> None:
        super().__init__(size, False)
        self.tokens = iter(tokens)  # of the queries, of the keys: the order of the starts

    def rows(self, x: Tensor, dim: int | None) -> Tensor:
        return _lead(x, dim, self.size).movedim(0, 2).flatten(2, 3)

    statistics = rows

    def starts(self, x: Tensor, dim: int | None) -> Tensor:
        x, tokens = _lead(x, dim, self.size), next(self.tokens)
        offsets = torch.arange(self.size, device=x.device, dtype=x.dtype) * tokens
        whole = (x[:, :-1] + offsets[:, None]).reshape(-1)
        return torch.cat([whole, offsets.new_full((1,), self.size * tokens)])

    def results(self, results: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results = [x.unflatten(2, (self.size, x.shape[2] // self.size)) for x in results]
        return tuple(results), (2,) * len(results)


def _lead(x: Tensor, dim: int | None, size: int) -> Tensor:
    """x with the mapped dimension in front, repeated without a copy where it is not mapped."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
