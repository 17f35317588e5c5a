"""Derivatives beyond the second: the reference differentiated by autograd, a few query rows at a
time, in O(S) memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.functional._autograd import is_batched_gradient, without_autocast
from fastattn.ops import Cotangents, Extras, Inputs, Options, Tangents

_SCORES = 1 << 20  # scores that exist at a time, of all heads and batch elements


def derivative(
    cotangents: Cotangents,
    inputs: Inputs,
    extras: Extras,
    tangents: Sequence[Tangents],
    options: Options,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The derivatives of <cotangents, (out, lse)> in all directions ``tangents``, and the gradients
    of the result.

    Args:
        cotangents, inputs, extras, tangents, options: as in ``fastattn._call``.
        needs: which gradients: of both cotangents (two results), query, key, value, mask.

    Returns:
        The six results in the inputs' dtypes, None for what is not needed.
    """
    query, key, value = inputs[:3]
    mask: Any = inputs.attn_mask
    x: Any
    for tangent in tangents:
        for name, x, t in zip(("query", "key", "value", "mask"), inputs, tangent, strict=True):
            if t is not None and t.shape != x.shape:
                raise ValueError(f"t_{name}: expected shape {tuple(x.shape)}, got {tuple(t.shape)}")
    if any(is_batched_gradient(x) for xs in (cotangents, *tangents) for x in xs if x is not None):
        raise RuntimeError(
            "is_grads_batched: expected the first or the second derivative of attention, got a "
            "higher one; torch.func.vmap of torch.func.vjp takes any"
        )
    accumulator = _accumulator(query)
    out = query.new_zeros((*query.shape[:-1], value.shape[-1]), dtype=accumulator)
    results: list[Any] = [out, out.new_zeros(query.shape[:-1])]
    results += [torch.zeros_like(x, dtype=accumulator) for x in (query, key, value)]
    has_gradient = mask is not None and mask.dtype != torch.bool
    results.append(torch.zeros_like(mask, dtype=accumulator) if has_gradient else None)

    everything = slice(None), slice(None), reference.Setting(options, extras)
    calls: Iterable[tuple[slice, slice, reference.Setting]] = [everything]
    if extras.starts_q is not None:
        calls = _sequences(options, extras)
    for rows_q, rows_k, call in calls:
        of = _Sequence(rows_q, rows_k)
        seq_q, seq_k = of.queries(query).shape[-2], of.keys(key).shape[-2]
        step = max(1, _SCORES // max(1, query.shape[:-2].numel() * seq_k))
        for i in range(0, seq_q, step):
            rows = slice(i, min(seq_q, i + step))
            found = _rows(
                [of.queries(cotangents[0], rows), of.statistics(cotangents[1], rows)],
                of.inputs(inputs, rows),
                [of.inputs(t, rows) for t in tangents],
                needs,
                replace(call, first_row=i),
            )
            targets = (
                of.queries(results[0], rows),
                of.statistics(results[1], rows),
                *of.inputs(results[2:], rows),
            )
            for target, grad in zip(targets, found, strict=True):
                if grad is not None:
                    target += grad
    dtypes = [query.dtype, accumulator, query.dtype, key.dtype, value.dtype, query.dtype]
    wanted = (needs[0], *needs)
    return [
        x.to(dtype) if need and x is not None else None
        for x, dtype, need in zip(results, dtypes, wanted, strict=True)
    ]


class _Sequence:
    """Views of the tensors at one of the packed sequences, and at some rows of it."""

    def __init__(self, rows_q: slice, rows_k: slice) -> None:
        self.rows_q, self.rows_k = rows_q, rows_k

    # Any is Tensor | None, like x.
    def queries(self, x: Tensor | None, rows: slice = slice(None)) -> Any:
        return None if x is None else x[..., self.rows_q, :][..., rows, :]

    def keys(self, x: Tensor | None) -> Any:
        return None if x is None else x[..., self.rows_k, :]

    def statistics(self, x: Tensor | None, rows: slice) -> Tensor | None:
        return None if x is None else x[..., self.rows_q][..., rows]

    def inputs(self, xs: Sequence[Tensor | None], rows: slice) -> list[Tensor | None]:
        query, key, value, mask = xs
        if mask is not None and mask.shape[-2] != 1:
            mask = mask[..., rows, :]
        return [self.queries(query, rows), self.keys(key), self.keys(value), mask]


def _sequences(
    options: Options, extras: Extras
) -> Iterator[tuple[slice, slice, reference.Setting]]:
    """Rows of queries and of keys of each of the packed sequences, and its call."""
    slopes, seed, starts_q, starts_k = extras
    assert starts_q is not None
    assert starts_k is not None
    count = starts_q.shape[0] - 1
    pairs = zip(*(itertools.pairwise(x.tolist()) for x in (starts_q, starts_k)), strict=True)
    for b, (rows_q, rows_k) in enumerate(pairs):
        call = reference.Setting(options, Extras(slopes, seed))
        if slopes is not None and slopes.dim() == 2:
            of_one = slopes[b // (count // slopes.shape[0])]
            call = replace(call, extras=call.extras._replace(slopes=of_one))
        if seed is not None:
            each = count // seed.numel()
            of_one = seed.reshape(-1)[b // each].reshape(1)
            call = replace(call, extras=call.extras._replace(seed=of_one), first_batch=b % each)
        yield slice(*rows_q), slice(*rows_k), call


def _rows(
    cotangents: list[Tensor | None],
    inputs: list[Tensor | None],
    tangents: list[list[Tensor | None]],
    needs: Sequence[bool],
    call: reference.Setting,
) -> list[Tensor | None]:
    """``derivative`` for rows whose scores all fit into memory."""

    def leaf(x: Tensor | None) -> Any:
        if x is None or x.dtype == torch.bool:
            return x
        return x.detach().to(_accumulator(x)).requires_grad_()

    leaves = Inputs(*map(leaf, inputs))
    each: Sequence[Any] = leaves
    tangents = [
        [None if t is None else t.to(x.dtype) for t, x in zip(ts, each, strict=True)]
        for ts in tangents
    ]
    with torch.enable_grad(), without_autocast(leaves.query):
        out, lse = reference.attention_in(leaves, call)
        lse = torch.where(lse == -math.inf, 0.0, lse)
        of = [leaf(torch.zeros_like(y) if c is None else c)
              for c, y in zip(cotangents, (out, lse), strict=True)]  # fmt: skip
        total = (out * of[0]).sum() + (lse * of[1]).sum()
        zero = torch.zeros_like(total)
        for ts in tangents:
            along = [(x, t) for x, t in zip(leaves, ts, strict=True) if t is not None]
            if not along or not total.requires_grad:
                return [None] * 6
            directions: list[Any] = [x for x, _ in along]
            grads = torch.autograd.grad(
                total, directions, create_graph=True, materialize_grads=True
            )
            total = sum(((g * t).sum() for g, (_, t) in zip(grads, along, strict=True)), zero)
        wanted: list[Any] = [
            x if need else None for x, need in zip([*of, *leaves], (needs[0], *needs), strict=True)
        ]
        at = [n for n, x in enumerate(wanted) if x is not None]
        if not at or not total.requires_grad:
            return [None] * 6
        grads = torch.autograd.grad(total, [wanted[n] for n in at], allow_unused=True)
    found: list[Tensor | None] = [None] * 6
    for n, grad in zip(at, grads, strict=True):
        found[n] = grad
    return found


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
