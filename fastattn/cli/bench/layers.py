"""Linear layers with an activation and dropout, several on one input, and gated, on both sides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.cli.bench.case import OURS, Case, Run, both_directions
from fastattn.functional import activation_dropout, gated_mlp, linear, multi_linear
from fastattn.verification.shapes import LINEAR, NORM

_SHAPES = ("BERT-base, 128 rows", "BERT-base", "MiniLM")


def layer_cases(peers: str) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from _activated(peers, dtype, 0.0)
    yield from _activated(peers, torch.float32, 0.1)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _gated(peers, dtype)
        yield from _queries_keys_values(peers, dtype)
    for p in (0.0, 0.1):
        yield from _activation_alone(peers, p)


def _cases(
    peers: str,
    name: str,
    dtype: torch.dtype,
    flops: float,
    elements: float,
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    inputs: Callable[[], list[Tensor]],
    random: bool = False,
) -> Iterator[Case]:
    def build(direction: str) -> dict[str, Run]:
        functions: dict[str, Callable[..., Tensor]] = {OURS: ours, "eager": eager}
        if peers == "all":
            functions["torch.compile"] = torch.compile(eager, dynamic=False)
        return both_directions(functions, [x.to(dtype) for x in inputs()], direction)

    for direction, factor in (("forward", 1), ("backward", 2)):
        yield Case(
            "linear", name, dtype, direction, factor * flops,
            factor * elements * dtype.itemsize, functools.partial(build, direction), random=random,
        )  # fmt: skip


def _weight(n_out: int, n_in: int) -> Tensor:
    return torch.randn(n_out, n_in) / n_in**0.5


def _activated(peers: str, dtype: torch.dtype, p: float) -> Iterator[Case]:
    for model, rows, n_in, n_out in (LINEAR[name] for name in _SHAPES):

        def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return linear(x, w, b, "gelu", p)

        def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.dropout(F.gelu(F.linear(x, w, b)), p)

        def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.gelu(F.linear(x, w, b))

        def inputs(rows=rows, n_in=n_in, n_out=n_out) -> list[Tensor]:
            return [torch.randn(rows, n_in), _weight(n_out, n_in), torch.randn(n_out)]

        yield from _cases(
            peers, f"{model} {rows}x{n_in}->{n_out}, GELU{f', dropout {p}' * (p > 0)}", dtype,
            2.0 * rows * n_in * n_out, rows * n_in + n_in * n_out + rows * n_out,
            ours, eager if p > 0 else plain, inputs, p > 0,
        )  # fmt: skip


def _gated(peers: str, dtype: torch.dtype) -> Iterator[Case]:
    rows, width, hidden = 512, 1024, 2816

    def ours(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return gated_mlp(x, gate, up, None)

    def eager(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    def inputs() -> list[Tensor]:
        return [torch.randn(rows, width), _weight(hidden, width), _weight(hidden, width)]

    yield from _cases(
        peers, f"SwiGLU {rows}x{width}->{hidden}", dtype, 4.0 * rows * width * hidden,
        rows * width + 2 * width * hidden + rows * hidden, ours, eager, inputs,
    )  # fmt: skip


def _queries_keys_values(peers: str, dtype: torch.dtype) -> Iterator[Case]:
    for model, rows, width, _ in (LINEAR[name] for name in _SHAPES):

        def ours(x: Tensor, *parameters: Tensor) -> Tensor:
            return torch.cat(multi_linear(x, parameters[:3], parameters[3:]), -1)

        def eager(x: Tensor, *parameters: Tensor) -> Tensor:
            pairs = zip(parameters[:3], parameters[3:], strict=True)
            return torch.cat([F.linear(x, w, b) for w, b in pairs], -1)

        def inputs(rows=rows, width=width) -> list[Tensor]:
            weights = [_weight(width, width) for _ in range(3)]
            return [torch.randn(rows, width), *weights, *torch.randn(3, width)]

        yield from _cases(
            peers, f"{model} q, k, v {rows}x{width}", dtype, 6.0 * rows * width * width,
            4 * rows * width + 3 * width * width, ours, eager, inputs,
        )  # fmt: skip


def _activation_alone(peers: str, p: float) -> Iterator[Case]:
    model, rows, width, _ = NORM["BERT-base"]
    name = "GELU-tanh" if p == 0 else f"dropout {p}"

    def ours(x: Tensor) -> Tensor:
        return activation_dropout(x, "gelu_tanh" if p == 0 else None, p)

    def eager(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh") if p == 0 else F.dropout(x, p)

    # An element takes about 20 operations; the random numbers are not counted.
    yield from _cases(
        peers, f"{model} {name} {rows}x{width}", torch.float32, 20.0 * rows * width,
        2.0 * rows * width, ours, eager, lambda: [torch.randn(rows, width)], p > 0,
    )  # fmt: skip
