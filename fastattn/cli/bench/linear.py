"""Linear layers and MLPs of models that everybody trains, on both sides."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.cli.bench.case import OURS, Case, Run, both_directions, training_steps
from fastattn.functional import linear_relu, mlp
from fastattn.verification.shapes import DIGITS, LINEAR


def linear_cases(peers: str) -> Iterator[Case]:
    for model, rows, n_in, n_out in LINEAR.values():

        def build(direction: str, rows=rows, n_in=n_in, n_out=n_out) -> dict[str, Run]:
            weight, bias = torch.randn(n_out, n_in) / n_in**0.5, torch.randn(n_out)
            functions = {OURS: linear_relu, "eager": lambda x, w, b: F.relu(F.linear(x, w, b))}
            if peers == "all":
                functions["torch.compile"] = torch.compile(functions["eager"], dynamic=False)
                if direction == "forward" and torch.backends.mkldnn.is_available():
                    functions["oneDNN fused"] = lambda x, w, b: torch.ops.mkldnn._linear_pointwise(
                        x, w, b, "relu", [], ""
                    )
            x = torch.randn(rows, n_in)
            # Of a sum that is about 0 the rounding decides what passes the ReLU.
            dead = F.linear(x, weight, bias).abs() < 1e-4
            return both_directions(functions, [x, weight, bias], direction, dead)

        flops = 2.0 * rows * n_in * n_out
        moved = 4.0 * (rows * n_in + n_in * n_out + rows * n_out)
        for direction, factor in (("forward", 1), ("backward", 2)):
            yield Case(
                "linear_relu", f"{model} {rows}x{n_in}->{n_out}", torch.float32, direction,
                factor * flops, factor * moved, functools.partial(build, direction),
            )  # fmt: skip


def mlp_cases(peers: str) -> Iterator[Case]:
    widths = DIGITS
    for rows in (64, 1024):
        flops = sum(2.0 * rows * a * b for a, b in itertools.pairwise(widths))
        moved = 4.0 * (rows * sum(widths) + sum(a * b for a, b in itertools.pairwise(widths)))
        name = f"{'-'.join(map(str, widths))}, batch {rows}"

        def functions(rows=rows) -> dict[str, Run]:
            linears = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
            w, b = [m.weight.data for m in linears], [m.bias.data for m in linears]
            x = torch.randn(rows, widths[0])

            @torch.no_grad()
            def ours() -> Sequence[Tensor]:
                return [mlp(x, w, b)]

            @torch.no_grad()
            def eager() -> Sequence[Tensor]:
                return [F.linear(F.relu(F.linear(x, w[0], b[0])), w[1], b[1])]

            return {OURS: ours, "eager": eager}

        def step(rows=rows) -> dict[str, Run]:
            first, last = (nn.Linear(a, b) for a, b in itertools.pairwise(widths))
            net = nn.Sequential(first, nn.ReLU(), last)
            x, target = torch.randn(rows, widths[0]), torch.randint(0, widths[-1], (rows,))

            def loss(net: nn.Module) -> Tensor:
                return F.cross_entropy(net(x), target)

            return training_steps(net, loss, peers, lr=0.01)

        yield Case("mlp", name, torch.float32, "forward", flops, moved, functions)
        # The input needs no gradient: the first layer's backward is one product.
        backward = 2 * flops - 2.0 * rows * widths[0] * widths[1]
        yield Case("mlp", f"{name}, SGD", torch.float32, "step", flops + backward, 3 * moved, step)
