"""The implementations of a model: eager, patched, compiled, and what others run models with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.cli.bench.case import OURS, Run
from fastattn.cli.bench.whole.engines import ENGINES, missing
from fastattn.cli.bench.whole.task import Batch, Results, Task, at_tokens, outputs_of, results_of
from fastattn.integrations import compiler
from fastattn.integrations.torch_nn import patch

PATCHED, COMPILED = f"{OURS} patched", f"{OURS} compiled"
EAGER_FLOAT32 = "eager float32"  # where eager is that under autocast
_LEARNING_RATE = 1e-5


class ModelRun:
    """A training step with AdamW, or inference, of ``module`` called by ``call``. ``is_true``: the
    module is the one that gave ``true``, and has its gradients."""

    keeps_memory = False

    def __init__(
        self,
        task: Task,
        true: Results,
        module: nn.Module,
        call: Callable[..., Any] | None = None,
        autocast: torch.dtype | None = None,
        is_true: bool = False,
    ) -> None:
        self.task, self.true, self.is_true = task, true, is_true
        self.module, self.autocast = module, autocast
        self.call: Callable[..., Any] = module if call is None else call
        self.compiled = call is not None
        self.batch = task.batch(task.parameters)
        # Fused, as transformers' Trainer has it.
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=_LEARNING_RATE, fused=True)

    def __call__(self) -> Sequence[Tensor]:
        with self._autocast():
            if not self.task.training:
                return [outputs_of(self.task, self.batch, self.call)]
            loss = self.call(**self.batch.inputs, labels=self.batch.labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [loss.detach()]

    def error(self) -> str:
        """A step of training is checked without dropout. It allocates the optimizer's state, and
        what is compiled is compiled when it ends."""
        error = "" if self.is_true else self._difference()
        if self.task.training:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.module.train()
            if self.compiled:
                self()
        return error

    def _difference(self) -> str:
        with self._autocast():
            found = results_of(self.task, self.batch, self.module, self.call)
        return found.difference(self.true, self.autocast or self.task.parameters)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.autocast, enabled=self.autocast is not None)


class EngineRun:
    """Inference by an engine that reads ONNX."""

    keeps_memory = True  # in an arena

    def __init__(self, task: Task, true: Results, engine: str) -> None:
        self.true, self.engine = true, engine
        self.batch: Batch = task.batch(torch.float32)
        self.function: Callable[[], Tensor] | None = None
        self.refusal = ""
        try:
            self.function = ENGINES[engine](task.model, self.batch.inputs)
        except Exception as error:  # whatever an exporter or an engine raises
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.refusal = f"does not run: {lines[0][:100]}"

    def __call__(self) -> Sequence[Tensor]:
        assert self.function is not None
        return [at_tokens(self.function(), self.batch)]

    def error(self) -> str:
        if self.refusal:
            return self.refusal
        (outputs,) = self()
        return Results(outputs).difference(self.true, torch.float32)


def implementations(task: Task, peers: str) -> dict[str, Run]:
    """By name, ours first. All have the same weights, and the same results to compare with:
    eager's in float32."""
    stock = task.model.build(task.training)
    true = results_of(task, task.batch(torch.float32), stock)
    found: dict[str, Run] = {}
    if task.autocast:
        found[EAGER_FLOAT32] = ModelRun(task, true, stock, is_true=True)
    if task.autocast or task.dtype != torch.float32:
        stock = copy.deepcopy(stock).to(task.parameters)
    else:
        found["eager"] = ModelRun(task, true, stock, is_true=True)
    make = functools.partial(ModelRun, task, true, autocast=task.dtype if task.autocast else None)
    found.setdefault("eager", make(stock))
    patched, compiled = copy.deepcopy(stock), copy.deepcopy(stock)
    patch(patched, unpad=task.model.padded)
    ours: dict[str, Run] = {
        PATCHED: make(patched),
        COMPILED: make(compiled, torch.compile(compiled, backend=compiler.backend)),
    }
    if peers == "all":
        inductor = copy.deepcopy(stock)
        found["torch.compile"] = make(inductor, torch.compile(inductor, dynamic=False))
    if not task.training and task.dtype == torch.float32:
        found |= {name: EngineRun(task, true, name) for name in ENGINES if not missing(name)}
    return ours | found
