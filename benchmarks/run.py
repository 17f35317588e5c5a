"""Paired timings against torch; README.md beside this file has the protocol."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastattn

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One call on both sides; ``flops`` is what the mathematics of one run needs."""

    name: str
    flops: float
    theirs: Callable[[], Tensor]
    ours: Callable[[], Tensor]


def both_ways(name: str, flops: float, backward: float, pair: list[Function], inputs) -> list[Case]:
    """The forward case without autograd, and forward+backward through fresh leaves."""

    def forward(function: Function) -> Callable[[], Tensor]:
        @torch.no_grad()
        def run() -> Tensor:
            return function(*inputs)

        return run

    def training(function: Function) -> Callable[[], Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        cotangent = torch.randn_like(function(*inputs))

        def run() -> Tensor:
            grads = torch.autograd.grad(function(*leaves), leaves, cotangent)
            return torch.cat([g.flatten() for g in grads])

        return run

    # The same cotangent on both sides.
    state = torch.get_rng_state()
    steps = []
    for function in pair:
        torch.set_rng_state(state)
        steps.append(training(function))
    return [
        Case(f"{name} forward", flops, *map(forward, pair)),
        Case(f"{name} forward+backward", (1 + backward) * flops, *steps),
    ]


def attention_cases() -> Iterator[Case]:
    for batch, heads, seq, dim in ((4, 12, 128, 64), (4, 12, 512, 64), (1, 12, 2048, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            for causal in (False, True):
                inputs = [torch.randn(batch, heads, seq, dim, dtype=dtype) for _ in range(3)]
                pair = [
                    lambda q, k, v, f=f, c=causal: f(q, k, v, is_causal=c)
                    for f in (F.scaled_dot_product_attention, fastattn.scaled_dot_product_attention)
                ]
                name = f"attention {batch}x{heads}x{seq}x{dim} {str(dtype)[6:]}"
                name += " causal" if causal else ""
                flops = 4.0 * batch * heads * seq * seq * dim / (2 if causal else 1)
                yield from both_ways(name, flops, 2.5, pair, inputs)


def linear_cases() -> Iterator[Case]:
    pair = [lambda x, w, b: F.relu(F.linear(x, w, b)), fastattn.linear_relu]
    for rows, n_in, n_out in ((64, 784, 128), (1024, 768, 3072)):
        inputs = [torch.randn(rows, n_in), torch.randn(n_out, n_in), torch.randn(n_out)]
        name = f"linear+ReLU {rows}x{n_in}->{n_out} float32"
        yield from both_ways(name, 2.0 * rows * n_in * n_out, 2, pair, inputs)


def seconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def matmul_peak() -> float:
    """Flop/s of torch's large float32 matrix product: a floor of the machine's peak."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: a @ a) for _ in range(10))


def agree(case: Case) -> bool:
    """A coarse gate against a wrong kernel; the accuracy policy is the tests' business. Also the
    warm-up."""
    theirs, ours = case.theirs(), case.ours()
    tolerance = 0.05 if theirs.dtype == torch.bfloat16 else 1e-3
    return bool(((theirs - ours).abs() <= tolerance * (1 + theirs.abs().max())).all())


def measure(case: Case, pairs: int) -> tuple[float, list[float]]:
    """Our median seconds, and torch's seconds over ours pair by pair."""
    ours, ratios = [], []
    for i in range(pairs):
        if i % 2:
            b, a = seconds(case.ours), seconds(case.theirs)
        else:
            a, b = seconds(case.theirs), seconds(case.ours)
        ours.append(b)
        ratios.append(a / b)
    return statistics.median(ours), ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of runs of each case")
    options = parser.parse_args()
    if options.pairs < 2:
        parser.error(f"--pairs: expected at least 2, got {options.pairs}")
    torch.manual_seed(0)
    peak = matmul_peak()
    title = f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
    table = Table(title=f"{title}matmul {peak / 1e9:.0f} GFLOP/s")
    for column in ("case", "GFLOP/s", "% of matmul", "torch / ours", "quartiles"):
        table.add_column(column, justify="left" if column == "case" else "right")
    wrong = 0
    for case in itertools.chain(attention_cases(), linear_cases()):
        if options.filter not in case.name:
            continue
        if not agree(case):
            wrong += 1
            table.add_row(case.name, "wrong result", "", "", "")
            continue
        median, ratios = measure(case, options.pairs)
        speed = case.flops / median
        low, middle, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            case.name,
            f"{speed / 1e9:.0f}",
            f"{100 * speed / peak:.0f}",
            f"{middle:.2f}",
            f"{low:.2f}-{high:.2f}",
        )
    Console(width=120).print(table)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
