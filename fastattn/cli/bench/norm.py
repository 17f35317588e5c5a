"""Dropout, residual sum and norm between the blocks of a Transformer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.cli.bench.case import OURS, Case, Run, both_directions
from fastattn.functional import dropout_add_norm
from fastattn.verification.shapes import NORM


def norm_cases(peers: str) -> Iterator[Case]:
    for model, rows, width, kind in NORM.values():
        for p in (0.0, 0.1) if kind == "layer" else (0.0,):

            def build(direction: str, rows=rows, width=width, kind=kind, p=p) -> dict[str, Run]:
                def ours(
                    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None
                ) -> Tensor:
                    return dropout_add_norm(x, residual, weight, bias, p, kind=kind)

                def eager(
                    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None
                ) -> Tensor:
                    total = residual + F.dropout(x, p)
                    if kind == "rms":
                        return F.rms_norm(total, (width,), weight)
                    return F.layer_norm(total, (width,), weight, bias)

                functions: dict[str, Callable[..., Tensor]] = {OURS: ours, "eager": eager}
                if peers == "all":
                    functions["torch.compile"] = torch.compile(eager, dynamic=False)
                inputs = [torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)]
                if kind == "layer":
                    inputs.append(torch.randn(width))
                return both_directions(functions, inputs, direction)

            name = f"{model} {rows}x{width}{f', dropout {p}' * (p > 0)}{', RMS' * (kind == 'rms')}"
            # The forward reads x and the residual, and writes the norm and, for the backward, the
            # sum. An element takes 8 operations forward, 12 backward, the random numbers aside.
            for direction, operations in (("forward", 8.0), ("backward", 12.0)):
                yield Case(
                    "dropout_add_norm", name, torch.float32, direction, operations * rows * width,
                    4.0 * 4 * rows * width, functools.partial(build, direction), random=p > 0,
                )  # fmt: skip
