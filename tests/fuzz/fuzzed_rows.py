"""Random problems of the operations that take a row at a time: an activation with dropout, and a
norm of a sum."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from drawn import DROPOUT_SEED, MAGNITUDES, Draw, Problem, add_special_value, drawn_dropout, shared
from terms import terms_of_activation, terms_of_norm
from torch import Tensor

import fastattn
from fastattn import ops


def _shape(made: Draw) -> tuple[int, ...]:
    rows, columns = made.size("rows", 300), made.size("columns", 1500)
    leading = ((), (rows,), (2, rows))[made.one("leading dimensions", (0, 1, 2), (1, 8, 2))]
    return (*leading, columns)


def activation(made: Draw) -> Problem:
    dtype, magnitude, order, threads = shared(made, (0, 1))
    name, p = made.one("activation", ops.ACTIVATIONS), drawn_dropout(made)
    x = made.laid_out(made.normal(*_shape(made), dtype=dtype, by=MAGNITUDES[magnitude]))
    if order == 0:
        add_special_value(made, [x])

    def run(leaves: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
        return [fastattn.activation_dropout(leaves[0], name, p, backend=backend)]

    problem = Problem("activation", run, [x], order, magnitude, threads)
    problem.dropped = 1.0 / (1.0 - p) if p < 1.0 else 1.0
    problem.terms = functools.partial(terms_of_activation, name)
    return problem


def norm(made: Draw) -> Problem:
    """Leaves x, and those of residual, weight and bias that there are."""
    dtype, magnitude, order, threads = shared(made, (0, 1))
    shape, by = _shape(made), MAGNITUDES[magnitude]
    wide = made.one("weight in the accumulator's dtype", (False, True), (2, 1))
    places = ["input"]
    leaves = [made.laid_out(made.normal(*shape, dtype=dtype, by=by))]
    for name, extents, size in (
        ("residual", shape, by),
        ("weight", shape[-1:], 1.0),
        ("bias", shape[-1:], 1.0),
    ):
        if made.one(name, (True, False), (2, 1)):
            places.append(name)
            leaves.append(made.laid_out(made.normal(*extents, dtype=dtype, by=size)))
    if order == 0:
        add_special_value(made, leaves)
    p, kind = drawn_dropout(made), made.one("norm", ("layer", "rms"))
    prenorm = made.one("with the sum", (False, True))
    eps = made.rng.choice((1e-5, 1e-2, torch.finfo(dtype).eps))

    def call(leaves: Sequence[Tensor], backend: str) -> tuple[Tensor, Tensor]:
        given = dict(zip(places, leaves, strict=True))
        for name in ("weight", "bias"):
            if wide and name in given and given[name].dtype.itemsize == 2:
                given[name] = given[name].float()
        return fastattn.dropout_add_norm(
            **given, dropout_p=p, eps=eps, kind=kind, prenorm=True, backend=backend
        )

    def run(leaves: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
        return call(leaves, backend)[: 1 + prenorm]

    def sum_of() -> Tensor:
        torch.default_generator.manual_seed(DROPOUT_SEED)
        return call([x.double() for x in leaves], "reference")[1]

    problem = Problem("norm", run, leaves, order, magnitude, threads)
    problem.dropped = 1.0 / (1.0 - p) if p < 1.0 else 1.0
    problem.terms = functools.partial(terms_of_norm, places, eps, kind == "rms", sum_of)
    return problem
