"""A small step of training, by the kernel and in float64 by the reference and ``torch.optim``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import ops, reference
from fastattn.verification.problems import Case, Comparison, Device, Random


class _Optimizer(NamedTuple):
    kind: type[torch.optim.Optimizer]
    options: dict[str, Any]
    rule: ops.Rule
    states: tuple[str, ...]  # of a parameter's shape


# An eps as large as the gradients are: a smaller one divides their roundings by themselves.
_OPTIMIZERS = (
    _Optimizer(
        torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, ops.Rule(0.1, 0.0, 0.9), ("momentum_buffer",)
    ),
    _Optimizer(
        torch.optim.Adam,
        {"lr": 0.1, "eps": 0.01},
        ops.Rule(0.1, 0.0, 0.9, 0.999, 0.01),
        ("exp_avg", "exp_avg_sq"),
    ),
    _Optimizer(
        torch.optim.RMSprop,
        {"lr": 0.1, "eps": 0.01},
        ops.Rule(0.1, 0.0, 0.0, 0.99, 0.01),
        ("square_avg",),
    ),
)


def solve_training_step(at: Device, case: Case) -> Iterator[Comparison]:
    """Two layers by each optimizer, in float32 where the case has 16 bits. No output of the hidden
    layer is near 0, where roundings decide what passes its ReLU."""
    dtype = case.dtype if case.dtype == torch.float64 else torch.float32
    random, widths = Random(dtype), (72, 2 * case.head_dim, 10)
    x, labels = random(case.rows, widths[0]), torch.arange(case.rows, device="cpu") % widths[-1]
    parameters = []
    for m, n in itertools.pairwise(widths):
        signs = torch.arange(n, device="cpu") % 2 * 2 - 1
        parameters += [random(n, m) / (10 * m**0.5), (2 * signs).to(dtype)]
    states = [[random(*p.shape).abs() for _ in range(2)] for p in parameters]

    def kernels() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, optimizer in enumerate(_OPTIMIZERS):
            mine = [p.clone() for p in parameters]
            kept = [[s.clone() for s in own[: len(optimizer.states)]] for own in states]
            steps = [torch.ones((), device="cpu")] if number else []
            rules = torch.tensor([optimizer.rule] * 4, dtype=torch.float64, device="cpu")
            flat = [t for own in kept for t in (*(s.clone() for s in steps), *own)]
            loss = ops.training_step(
                x,
                labels,
                mine,
                flat,
                rules,
                [True, False],
                number,
                ops.LossOptions("cross_entropy"),
            )
            found |= _named(optimizer, loss, mine, kept)
        return found

    actual = at.run(kernels)
    for name, y in _expected(x, labels, parameters, states).items():
        yield Comparison(name, actual[name], y)


def _named(
    optimizer: _Optimizer, loss: Tensor, parameters: list[Tensor], states: list[list[Tensor]]
) -> dict[str, Tensor]:
    kind = optimizer.kind.__name__
    found = {f"loss ({kind})": loss.reshape(1)}
    for place, p, own in zip(("w1", "b1", "w2", "b2"), parameters, states, strict=True):
        found[f"{place} ({kind})"] = p
        found |= {f"{s} of {place}": t for s, t in zip(optimizer.states, own, strict=True)}
    return found


def _expected(
    x: Tensor, labels: Tensor, parameters: list[Tensor], states: list[list[Tensor]]
) -> dict[str, Tensor]:
    x, (w1, b1, w2, b2) = x.double(), (p.double() for p in parameters)
    hidden = reference.linear_relu(x, w1, b1)
    out = torch.nn.functional.linear(hidden, w2, b2)
    loss = torch.nn.functional.cross_entropy(out, labels)
    classes = torch.arange(out.shape[1], device="cpu")
    grad = (out.softmax(1) - (labels[:, None] == classes).double()) / len(x)
    whole = torch.ones_like(out, dtype=torch.bool)
    grad, dw2, db2 = reference.linear_relu_backward(grad, hidden, w2, whole)
    _, dw1, db1 = reference.linear_relu_backward(grad, x, w1, hidden > 0)
    found: dict[str, Tensor] = {}
    for optimizer in _OPTIMIZERS:
        mine = [torch.nn.Parameter(p.clone()) for p in (w1, b1, w2, b2)]
        torchs = optimizer.kind(mine, **optimizer.options)
        kept: list[list[Tensor]] = []
        for p, gradient, own in zip(mine, (dw1, db1, dw2, db2), states, strict=True):
            p.grad = gradient
            mean_and_square = zip(optimizer.states, own, strict=False)
            state = {"step": torch.ones((), device="cpu")}
            state |= {name: t.double().clone() for name, t in mean_and_square}
            torchs.state[p] = state
            kept.append([state[name] for name in optimizer.states])
        torchs.step()
        found |= _named(optimizer, loss, [p.detach() for p in mine], kept)
    return found
