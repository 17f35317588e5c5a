"""Inference of a sentence model: embeddings of real sentences, their lengths as they come."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import fastattn
from fastattn.cli.demo.bert import PATCHED, corpus_of
from fastattn.cli.demo.compare import Run, Task, metrics_of, side_by_side
from fastattn.cli.memory import peak_bytes
from fastattn.cli.pretrained import model_path

RUNS = ("torch sdpa", PATCHED)
BATCH = 32
LEAST_COSINE = 0.9999
Batch = dict[str, Tensor]


@torch.inference_mode()
def embed(model: nn.Module, batch: Batch) -> Tensor:
    """The mean of each sentence's tokens, of length 1."""
    tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return F.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)


def run_sentences(options: argparse.Namespace, console: Console) -> Task:
    from transformers import AutoModel, AutoTokenizer

    path = model_path(options.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    corpus = corpus_of(options)
    sentences = [*corpus.train, *corpus.test]
    batches = [
        tokenizer(
            [s.text for s in sentences[i : i + BATCH]],
            padding=True, truncation=True, max_length=128, return_tensors="pt",
        ).data
        for i in range(0, len(sentences), BATCH)
    ]  # fmt: skip
    stock = AutoModel.from_pretrained(path, attn_implementation="sdpa").eval()
    ours = copy.deepcopy(stock)
    runs = [Run(name) for name in RUNS]
    runs[1].report = str(fastattn.patch(ours, unpad=True))
    found: list[list[Tensor]] = [[] for _ in runs]

    def collected(model: nn.Module, vectors: list[Tensor]) -> Callable[[Batch], None]:
        return lambda batch: vectors.append(embed(model, batch))

    models = (stock, ours)
    steps = [collected(*pair) for pair in zip(models, found, strict=True)]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("sentence embeddings, side by side", total=len(batches))
        speeds = side_by_side(steps, progress.track(batches, task_id=bar))
    labels = torch.tensor([s.label for s in sentences])
    vectors = [torch.cat(of_run) for of_run in found]
    for run, model, own, speed in zip(runs, models, vectors, speeds, strict=True):
        run.speed = speed
        run.memory = peak_bytes(partial(embed, model, batches[0]))
        run.metrics = _nearest(own, labels, len(corpus.train))
    cosine = float((vectors[0] * vectors[1]).sum(-1).min())
    runs[1].good = cosine >= LEAST_COSINE
    runs[1].check = f"cosine with torch's at least {cosine:.6f}"
    about = (
        f"{len(sentences)} sentences in batches of {BATCH}. Quality: whether the most similar "
        f"sentence of {len(corpus.train)} comes from the package that a sentence is from."
    )
    return Task(f"sentence model, batches of {BATCH}", runs, about)


def _nearest(vectors: Tensor, labels: Tensor, known: int) -> dict[str, float]:
    """The first ``known`` sentences tell the label of the most similar of the others."""
    nearest = (vectors[known:] @ vectors[:known].T).argmax(1)
    return metrics_of(labels[known:], labels[:known][nearest])
