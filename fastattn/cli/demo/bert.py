"""BERT fine-tuned by the Hugging Face Trainer: SDPA beside fastattn, patched and as the compiler
backend, from the same start on the same batches."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from sklearn.metrics import accuracy_score, f1_score, recall_score

import fastattn
from fastattn.cli.demo.corpus import Corpus, Sentence, load_corpus
from fastattn.cli.pretrained import model_path

if TYPE_CHECKING:
    from transformers import Trainer

RUNS = ("torch sdpa", "fastattn.patch", 'torch.compile, backend "fastattn"')
ACCURACY_TOLERANCE = 0.02
ABOVE_MAJORITY = 0.2
MAX_TOKENS = 64


@dataclass
class Run:
    """One fine-tuning: metrics on held-out data, losses, what fastattn reports of the model, and
    how many times faster than stock torch's a step is."""

    implementation: str
    metrics: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    report: str = ""
    speedup: float = 1.0


@dataclass
class BertResult:
    """The runs, stock first, and the share of the most frequent class in the held-out data."""

    runs: list[Run]
    majority: float
    classes: int
    sizes: tuple[int, int]

    def good(self, run: Run) -> bool:
        """Whether the run learned as much as stock torch's, and something."""
        accuracy, stock = run.metrics["accuracy"], self.runs[0].metrics["accuracy"]
        learned = min(accuracy, stock) >= self.majority + ABOVE_MAJORITY
        return learned and abs(accuracy - stock) <= ACCURACY_TOLERANCE

    @property
    def all_good(self) -> bool:
        return all(map(self.good, self.runs))

    def rows(self) -> list[tuple[str, ...]]:
        rows = []
        for run in self.runs:
            first = run is self.runs[0]
            check = "" if first else f"majority class {self.majority:.3f}"
            rows.append(
                (
                    f"BERT, {self.classes} packages" if first else "",
                    run.implementation,
                    *(f"{run.metrics[k]:.3f}" for k in ("accuracy", "recall", "f1")),
                    f"{run.speedup:.2f}x{'' if first else ' a step'}",
                    check if self.good(run) else f"{check}: FAILED",
                )
            )
        return rows


def _dataset(part: list[Sentence], tokenizer) -> list[dict]:
    tokens = tokenizer([s.text for s in part], truncation=True, max_length=MAX_TOKENS)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": sentence.label}
        for ids, mask, sentence in zip(
            tokens["input_ids"], tokens["attention_mask"], part, strict=True
        )
    ]


def _metrics(prediction) -> dict[str, float]:
    predicted = np.argmax(prediction.predictions, axis=-1)
    truth = prediction.label_ids
    return {
        "accuracy": accuracy_score(truth, predicted),
        "recall": recall_score(truth, predicted, average="macro", zero_division=0),
        "f1": f1_score(truth, predicted, average="macro", zero_division=0),
    }


def run_bert(options: argparse.Namespace, console: Console) -> BertResult:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # a new classification head is no surprise here
    logging.disable_progress_bar()
    path = model_path(options.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    train_cap, test_cap = (16, 10) if options.quick else (160, 100)
    corpus = load_corpus(options.seed, packages=8, train_cap=train_cap, test_cap=test_cap)
    sizes = (len(corpus.train), len(corpus.test))
    console.print(
        f"BERT from {path}: which of {len(corpus.packages)} packages does a docstring sentence "
        f"come from? {sizes[0]} sentences to learn from, {sizes[1]} from other modules to judge it"
    )
    data = [_dataset(part, tokenizer) for part in (corpus.train, corpus.test)]
    runs, trainers = [], []
    for name in RUNS:
        run, trainer = _fine_tune(name, path, tokenizer, corpus, data, options, console)
        runs.append(run)
        trainers.append(trainer)
    batches = list(trainers[0].get_train_dataloader())
    for run, speedup in zip(runs, step_speedups(trainers, batches, console), strict=True):
        run.speedup = speedup
    return BertResult(runs, corpus.majority, len(corpus.packages), sizes)


def step_speedups(trainers: list[Trainer], batches: list[dict], console: Console) -> list[float]:
    """How many times faster than the first Trainer's a training step of each is: the median over
    the batches. The Trainers take turns on every batch and each begins as often as another, so
    that a machine that slows down slows all of them."""
    ratios: list[list[float]] = [[] for _ in trainers]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("BERT: steps side by side", total=len(batches))
        for number, batch in enumerate(batches):
            seconds = [0.0] * len(trainers)
            for turn in range(len(trainers)):
                which = (number + turn) % len(trainers)
                seconds[which] = _seconds_of_a_step(trainers[which], batch)
            for found, ours in zip(ratios, seconds, strict=True):
                found.append(seconds[0] / ours)
            progress.advance(task)
    return [statistics.median(found) for found in ratios]


def _seconds_of_a_step(trainer: Trainer, batch: dict) -> float:
    start = time.perf_counter()
    trainer.training_step(trainer.model_wrapped, dict(batch))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _fine_tune(
    implementation: str,
    path: str,
    tokenizer,
    corpus: Corpus,
    data: list[list[dict]],
    options: argparse.Namespace,
    console: Console,
) -> tuple[Run, Trainer]:
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )
    from transformers.trainer_callback import PrinterCallback

    from fastattn.cli.demo.progress import ProgressBar
    from fastattn.integrations.transformers import register

    set_seed(options.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=len(corpus.packages),
        attn_implementation="sdpa",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    _, patched, compiled = RUNS
    run = Run(implementation)
    if implementation == patched:
        run.report = str(fastattn.patch(model))
        console.print(run.report)
    if implementation == compiled:
        register()  # the Trainer asks accelerate for the backend
    epochs = options.epochs or (1.0 if options.quick else 2.0)
    steps = epochs * len(data[0]) / options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=64,
                learning_rate=options.learning_rate,
                warmup_steps=int(options.warmup_ratio * steps),
                weight_decay=options.weight_decay,
                logging_steps=5,
                save_strategy="no",
                report_to=[],
                seed=options.seed,
                data_seed=options.seed,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=False,
                disable_tqdm=True,
                torch_compile_backend="fastattn" if implementation == compiled else None,
            ),
            train_dataset=data[0],
            eval_dataset=data[1],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=_metrics,
            callbacks=[ProgressBar(f"BERT, {implementation}", console)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        evaluated = trainer.evaluate()
    if implementation == compiled:
        run.report = str(fastattn.compile_report())
        console.print(run.report)
    run.metrics = {name: evaluated[f"eval_{name}"] for name in ("accuracy", "recall", "f1")}
    run.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return run, trainer
