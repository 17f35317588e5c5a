"""One timed call, and how implementations are made of functions and of models.

FLOP convention: attention forward 4·B·H·Sq·Sk·D, half of it when causal (the window's share under a
window), backward 2.5 times the forward; a linear layer 2·M·N·K, backward twice that. Bytes count
every input and result once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastattn.integrations import compiler
from fastattn.integrations.torch_nn import patch

Run = Callable[[], Sequence[Tensor]]
OURS = "fastattn"  # what the names of our implementations begin with
OURSELVES = "our "  # what the names of peers begin with that are our own


@runtime_checkable
class Checked(Protocol):
    """A Run that has a check of its own."""

    keeps_memory: bool  # from one run to the next, so that a later run's peak says nothing

    def __call__(self) -> Sequence[Tensor]: ...

    def error(self) -> str:
        """How its results are wrong; empty where they are right."""


@dataclass(frozen=True)
class Case:
    """One call. ``build`` makes the implementations, ours and the peers, on the same tensors. Each
    is Checked, or none is: then ours is compared with the peers."""

    op: str
    name: str
    dtype: torch.dtype
    direction: str  # forward, backward, step, jvp or double backward
    flops: float
    bytes: float
    build: Callable[[], dict[str, Run]] = field(repr=False, compare=False)
    seq: int = 0  # what the speed is plotted over
    random: bool = False  # dropout: the results differ
    least_rounds: int = 5
    variant: str = ""  # which of our implementations, where there are several

    @property
    def key(self) -> tuple[str, str, str, str]:
        name = f"{self.name}, {self.variant}" if self.variant else self.name
        return self.op, name, str(self.dtype)[6:], self.direction


def both_directions(
    functions: dict[str, Callable[..., Tensor]],
    inputs: list[Tensor],
    direction: str,
    dead: Tensor | None = None,
) -> dict[str, Run]:
    """The forward without autograd, or the backward alone over a graph that is kept. Where ``dead``
    is True the output's gradient is 0."""

    def forward(function: Callable[..., Tensor]) -> Run:
        @torch.no_grad()
        def run() -> Sequence[Tensor]:
            return [function(*inputs)]

        return run

    def backward(function: Callable[..., Tensor]) -> Run:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        if dead is not None:
            cotangent.masked_fill_(dead, 0.0)
        return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)

    wrap = forward if direction == "forward" else backward
    return {name: wrap(function) for name, function in functions.items()}


def training_steps(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    peers: str,
    lr: float,
    compiled: bool = False,
) -> dict[str, Run]:
    """Whole SGD steps of ``model``, ours on a copy that is patched, or ``compiled`` with our
    backend. They return the parameters."""

    def step(model: nn.Module, call: Callable | None = None) -> Run:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)

        def run() -> Sequence[Tensor]:
            optimizer.zero_grad()
            loss(model if call is None else call).backward()
            optimizer.step()
            return [p.detach() for p in model.parameters()]

        return run

    stock, ours = copy.deepcopy(model), copy.deepcopy(model)
    if compiled:
        call = torch.compile(ours, backend=compiler.backend)
    else:
        patch(ours)
        call = None
    found = {OURS: step(ours, call), "eager": step(stock)}
    if peers == "all":
        inductor = copy.deepcopy(model)
        found["torch.compile"] = step(inductor, torch.compile(inductor, dynamic=False))
    return found
