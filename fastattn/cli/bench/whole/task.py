"""What is asked of each implementation of a model, and the results that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.cli.bench.measure import TOLERANCE, relative_error
from fastattn.cli.bench.whole.batches import Batch, batch_of
from fastattn.cli.bench.whole.models import Model


@dataclass(frozen=True)
class Task:
    """A training step, or inference, of a model on a batch."""

    model: Model
    lengths: tuple[int, ...]
    training: bool
    dtype: torch.dtype = torch.float32  # of the parameters, or of autocast
    autocast: bool = False  # the parameters are float32

    @property
    def parameters(self) -> torch.dtype:
        return torch.float32 if self.autocast else self.dtype

    def batch(self, dtype: torch.dtype) -> Batch:
        return batch_of(self.model, self.lengths, dtype)


@dataclass(frozen=True)
class Results:
    """Of a model without dropout: its outputs at tokens; in training the loss, and a gradient for
    each parameter."""

    outputs: Tensor
    loss: Tensor | None = None
    gradients: list[Tensor | None] | None = None

    def difference(self, true: Results, dtype: torch.dtype) -> str:
        """How these results are further from ``true`` ones than ``dtype`` explains."""
        found = {"the outputs are": relative_error(self.outputs, true.outputs)}
        if self.loss is not None and true.loss is not None:
            found["the loss is"] = relative_error(self.loss, true.loss)
        if self.gradients is not None and true.gradients is not None:
            found["the gradient is"] = _distance(self.gradients, true.gradients)
        for what, worst in found.items():
            if not worst <= TOLERANCE[dtype]:
                return f"{what} off eager's in float32 by {worst:.2e}"
        return ""


def results_of(
    task: Task, batch: Batch, module: nn.Module, call: Callable[..., Any] | None = None
) -> Results:
    """Those of ``call``, which is the ``module`` or made of it; its gradients stay on its
    parameters. It is left in evaluation mode."""
    module.eval()
    call = module if call is None else call
    if not task.training:
        return Results(outputs_of(task, batch, call))
    module.zero_grad()
    out = call(**batch.inputs, labels=batch.labels)
    out.loss.backward()
    gradients = [p.grad for p in module.parameters()]
    return Results(out.logits.detach().float(), out.loss.detach().float(), gradients)


@torch.no_grad()
def outputs_of(task: Task, batch: Batch, call: Callable[..., Any]) -> Tensor:
    return at_tokens(call(**batch.inputs).last_hidden_state, batch)


def at_tokens(hidden: Tensor, batch: Batch) -> Tensor:
    """``[tokens, width]``; what an implementation leaves at places of padding has no meaning."""
    return (hidden.flatten(0, 1) if batch.tokens is None else hidden[batch.tokens]).float()


def _distance(found: list[Tensor | None], true: list[Tensor | None]) -> float:
    """The relative distance of two gradients, each as one vector of all parameters."""
    squares = torch.zeros(2, dtype=torch.float64)
    for a, b in zip(found, true, strict=True):
        if a is None and b is None:
            continue
        if a is None or b is None:
            return torch.inf
        squares[0] += (a.float() - b).square().sum()
        squares[1] += b.square().sum()
    return float((squares[0] / squares[1]).sqrt())
