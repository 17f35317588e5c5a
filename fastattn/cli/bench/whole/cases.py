"""Which steps of which models are timed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastattn.cli.bench.case import Case
from fastattn.cli.bench.whole.batches import image_tokens, lengths_of
from fastattn.cli.bench.whole.models import Model, models
from fastattn.cli.bench.whole.runs import implementations
from fastattn.cli.bench.whole.task import Task

OP = "models"
FILLS = (0.4, 0.6, 1.0)
TYPICAL_FILL = 0.6
LEAST_ROUNDS = 3  # a step of the larger models takes seconds


class _Mode(NamedTuple):
    """What is computed in."""

    dtype: torch.dtype
    autocast: bool = False


_FLOAT32 = _Mode(torch.float32)
_BFLOAT16 = _Mode(torch.bfloat16)
_MODES = {True: (_FLOAT32, _BFLOAT16, _Mode(torch.bfloat16, True)), False: (_FLOAT32, _BFLOAT16)}
# Batches by the model's family: those of training, those of inference.
_TRAINING = {
    "MiniLM": ((16, 128),), "BERT-base": ((8, 128),), "GPT-2": ((4, 512),), "ViT-B/16": ((8, 197),),
    "Llama-like": ((4, 512),),
}  # fmt: skip
_INFERENCE = _TRAINING | {"MiniLM": ((32, 32), (32, 128), (8, 256))}
_QUERIES = {"MiniLM": ((1, 16), (1, 64))}  # one sentence


def whole_model_cases(peers: str, grid: bool = False, quick: bool = False) -> Iterator[Case]:
    """Training steps, then inference.

    Args:
        peers: "default" or "all".
        grid: every model whole, in every dtype at every fill. Else of the larger models a few
            layers, and fewer combinations.
        quick: two narrow layers of each model, batches of 3 short rows.
    """
    found = list(models(whole=grid, quick=quick))
    for training, model in itertools.product((True, False), found):
        for lengths, fill, mode in _settings(model, training, grid, quick):
            yield _case(Task(model, lengths, training, *mode), fill, peers)


def _settings(
    model: Model, training: bool, grid: bool, quick: bool
) -> Iterator[tuple[tuple[int, ...], float, _Mode]]:
    """Lengths of the sequences, their share of the batch, what is computed in."""
    modes = _MODES[training]
    for batch, seq in (_TRAINING if training else _INFERENCE)[model.family]:
        if quick:
            batch, seq = 3, 24
        if model.kind == "image encoder":
            seq = image_tokens(model)
        for fill, mode in itertools.product(FILLS if model.padded else (1.0,), modes):
            if grid or _is_chosen(model.family, fill, mode):
                yield lengths_of(batch, seq, fill), fill, mode
        if quick:
            break
    for batch, seq in () if training or quick else _QUERIES.get(model.family, ()):
        for mode in modes if grid else modes[:1]:
            yield (seq,) * batch, 1.0, mode


def _is_chosen(family: str, fill: float, mode: _Mode) -> bool:
    """What a run without ``--grid`` has: MiniLM at all fills in float32 and at one in bfloat16, the
    others in float32."""
    if family == "MiniLM":
        return mode == _FLOAT32 or fill == TYPICAL_FILL
    return mode == _FLOAT32 and (fill == TYPICAL_FILL or family != "BERT-base")


def _case(task: Task, fill: float, peers: str) -> Case:
    model, lengths = task.model, task.lengths
    notes = [f"{model.name} {len(lengths)}x{max(lengths)}"]
    if model.padded and len(lengths) > 1:
        notes.append(f"fill {fill}")
    if task.autocast:
        notes.append("autocast")
    size = task.parameters.itemsize
    return Case(
        OP, ", ".join(notes), task.dtype, "step" if task.training else "forward",
        model.flops(lengths, task.training), model.bytes(lengths, task.training, size),
        functools.partial(implementations, task, peers), seq=max(lengths),
        least_rounds=LEAST_ROUNDS,
    )  # fmt: skip
