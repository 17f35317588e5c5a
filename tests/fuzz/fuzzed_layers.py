"""Random problems of linear layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from drawn import MAGNITUDES, Draw, Problem, add_special_value, drawn_dropout, shared
from terms import terms_of_activated_layers, terms_of_gated, terms_of_layers
from torch import Tensor

import fastattn
from fastattn import ops, reference
from fastattn.functional import LinearFunction


def _layers(made: Draw, rows: int, widths: list[int], biased: list[bool]) -> Problem:
    """Leaves x, weights, biases. Where derivatives are wanted, no sum is near 0, where rounding
    would decide on which side of the ReLU it is: inputs are positive, a unit's weights and bias
    have one sign."""
    dtype, magnitude, order, threads = shared(made)
    if order and magnitude == "subnormal":
        magnitude = "tiny"
    x = made.normal(rows, widths[0], dtype=dtype, by=MAGNITUDES[magnitude])
    weights, biases = [], []
    for n_in, n_out, bias in zip(widths, widths[1:], biased, strict=False):
        w, b = (made.normal(*n, dtype=dtype) for n in ((n_out, n_in), (n_out,)))
        w = w / max(1, n_in) ** 0.5
        if order:
            signs = 1 - 2 * torch.randint(2, (n_out,), generator=made.tensors)
            w, b = w.abs() * signs[:, None], b.abs() * signs
        weights.append(made.laid_out(w.to(dtype)))
        biases += [b.to(dtype)] if bias else []
    x = made.laid_out(x.abs() if order else x)
    problem = Problem(
        "", lambda leaves, backend: [], [x, *weights, *biases], order, magnitude, threads
    )
    problem.layers, problem.terms = len(weights), terms_of_layers
    return problem


def linear_relu(made: Draw) -> Problem:
    widths = [made.size("inputs", 300), made.size("outputs", 300)]
    biased = made.one("bias", (True, False))
    problem = _layers(made, made.size("rows", 300), widths, [biased])
    problem.op = "linear_relu"
    problem.run = lambda leaves, backend: [fastattn.linear_relu(*leaves, backend=backend)]
    return problem


def mlp(made: Draw) -> Problem:
    layers = made.one("layers", (1, 2, 3))
    widths = [made.size("outputs", 150) for _ in range(layers + 1)]
    biased = [made.rng.random() < 0.7 for _ in range(layers)]
    problem = _layers(made, made.size("rows", 200), widths, biased)

    def run(leaves: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
        rest = iter(leaves[1 + layers :])
        shifts = [next(rest) if b else None for b in biased]
        return [fastattn.mlp(leaves[0], list(leaves[1 : 1 + layers]), shifts, backend=backend)]

    problem.op, problem.run = "mlp", run
    return problem


class _Drawn:
    """The input and the parameters of layers beside each other. Under a ReLU of which derivatives
    are wanted no sum is near 0, as in ``_layers``."""

    def __init__(self, made: Draw) -> None:
        self.made = made
        self.dtype, self.magnitude, self.order, self.threads = shared(made, (0, 1))
        self.activation = made.one("activation", ops.ACTIVATIONS)
        if self.order and self.magnitude == "subnormal":
            self.magnitude = "tiny"
        squares = self.activation == "relu2" and self.dtype == torch.float16
        if self.order and squares and self.magnitude in ("300", "4000"):
            self.magnitude = "30"  # what lies between the results overflows
        self.one_sided = self.order > 0 and self.activation == "relu"
        self.inputs = made.size("inputs", 300)
        rows = made.size("rows", 300)
        leading = ((), (rows,), (2, rows))[made.one("leading dimensions", (0, 1, 2), (1, 8, 1))]
        x = made.normal(*leading, self.inputs, dtype=self.dtype, by=MAGNITUDES[self.magnitude])
        self.leaves = [made.laid_out(x.abs() if self.one_sided else x)]
        self.biases: list[Tensor | None] = []

    def add_layer(self, outputs: int, one_sided: bool) -> None:
        """A weight, and a bias or none."""
        made, k = self.made, self.inputs
        w, b = (made.normal(*n, dtype=torch.float64) for n in ((outputs, k), (outputs,)))
        w = w / max(1, k) ** 0.5
        if one_sided:
            signs = 1 - 2 * torch.randint(2, (outputs,), generator=made.tensors)
            w, b = w.abs() * signs[:, None], b.abs() * signs
        self.leaves.append(made.laid_out(w.to(self.dtype)))
        self.biases.append(b.to(self.dtype) if made.one("bias", (True, False)) else None)

    def biases_of(self, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """The biases that stand behind the weights in the leaves, and None for those that are
        absent."""
        rest = iter(leaves[1 + len(self.biases) :])
        return [None if b is None else next(rest) for b in self.biases]

    def problem(self, special: bool = True) -> Problem:
        """The problem, without its call. ``special``: a value may be infinite or NaN."""
        leaves = [*self.leaves, *(b for b in self.biases if b is not None)]
        if special and self.order == 0:
            add_special_value(self.made, leaves)
        return Problem(
            "", lambda leaves, backend: [], leaves, self.order, self.magnitude, self.threads
        )


def layers(made: Draw) -> Problem:
    """A layer with an activation and dropout, or several on one input."""
    drawn, count = _Drawn(made), made.one("weights", (1, 2, 3))
    activation, p = drawn.activation, drawn_dropout(made) if count == 1 else 0.0
    for _ in range(count):
        drawn.add_layer(made.size("outputs", 300), drawn.one_sided)
    problem = drawn.problem()

    def run(leaves: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
        x, weights, biases = leaves[0], list(leaves[1 : 1 + count]), drawn.biases_of(leaves)
        if count == 1:
            return [fastattn.linear(x, *weights, *biases, activation, p, backend=backend)]
        if activation is None:
            return fastattn.multi_linear(x, weights, biases, backend=backend)
        if backend == "reference":
            pairs = zip(weights, biases, strict=True)
            return [reference.linear(x, w, b, activation=activation) for w, b in pairs]
        save = problem.order > 0
        return LinearFunction.apply(x, activation, 0.0, None, save, count, *weights, *biases)[
            :count
        ]

    problem.op, problem.run = "layers", run
    problem.dropped = 1.0 / (1.0 - p) if p < 1.0 else 1.0
    problem.terms = functools.partial(terms_of_activated_layers, activation, drawn.biases_of)
    return problem


def gated(made: Draw) -> Problem:
    """The product of a layer with an activation and one without."""
    drawn, outputs = _Drawn(made), made.size("outputs", 300)
    drawn.add_layer(outputs, drawn.one_sided)
    drawn.add_layer(outputs, False)
    # A gate that is 0 in float32 and not in float64 is NaN times an infinity, or is not.
    problem = drawn.problem(special=drawn.magnitude in ("1", "tiny"))

    def run(leaves: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
        biases, options = drawn.biases_of(leaves), {"activation": drawn.activation}
        return [fastattn.gated_mlp(*leaves[:3], None, *biases, backend=backend, **options)]

    problem.op, problem.run = "gated", run
    problem.terms = functools.partial(terms_of_gated, drawn.activation, drawn.biases_of)
    return problem
