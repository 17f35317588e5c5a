"""BERT fine-tuned by the Hugging Face Trainer: SDPA beside fastattn, patched, as the compiler
backend and in 16 bits, from the same start on the same batches."""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

import fastattn
from fastattn.cli.demo.compare import METRICS, Run, Task, metrics_of, side_by_side, tolerance
from fastattn.cli.demo.corpus import Corpus, Sentence, load_corpus
from fastattn.cli.demo.profile import seconds_by_kind
from fastattn.cli.memory import peak_bytes
from fastattn.cli.pretrained import model_path

if TYPE_CHECKING:
    from transformers import Trainer

PATCHED = "fastattn.patch(unpad=True)"
COMPILED = 'torch.compile, backend "fastattn"'
PATCHED_BF16 = f"{PATCHED}, bfloat16 autocast"
RUNS = ("torch sdpa", PATCHED, COMPILED, PATCHED_BF16)
ABOVE_MAJORITY = 0.2
MAX_TOKENS = 64
LOGGED = 5  # steps between two entries of the loss curves
TIMED_STEPS = 24


def corpus_of(options: argparse.Namespace) -> Corpus:
    """The sentences of 8 packages."""
    train_cap, test_cap = (16, 10) if options.quick else (100, 80)
    return load_corpus(options.seed, packages=8, train_cap=train_cap, test_cap=test_cap)


def _dataset(part: list[Sentence], tokenizer) -> list[dict]:
    tokens = tokenizer([s.text for s in part], truncation=True, max_length=MAX_TOKENS)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": sentence.label}
        for ids, mask, sentence in zip(
            tokens["input_ids"], tokens["attention_mask"], part, strict=True
        )
    ]


def _metrics(prediction) -> dict[str, float]:
    return metrics_of(prediction.label_ids, np.argmax(prediction.predictions, axis=-1))


def run_bert(options: argparse.Namespace, console: Console) -> Task:
    from transformers import AutoTokenizer

    path = model_path(options.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    corpus = corpus_of(options)
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
    _compare_steps(runs, trainers, options, console)
    for run in runs if not options.quick else ():  # a few steps teach nothing
        _judge(run, runs[0], corpus)
    filled = sum(sum(row["attention_mask"]) for row in data[0])
    about = (
        f"{sizes[0]} sentences to learn from, {sizes[1]} from other modules to be judged by; the "
        f"most frequent class is {corpus.majority:.1%} of them. A sentence has "
        f"{filled / sizes[0]:.0f} tokens on average, and a batch is padded to its longest."
    )
    return Task(f"BERT, {len(corpus.packages)} packages", runs, about, LOGGED)


def _compare_steps(
    runs: list[Run], trainers: list[Trainer], options: argparse.Namespace, console: Console
) -> None:
    """Speed, memory and where the time goes, of a training step of each."""
    batches = list(trainers[0].get_train_dataloader())[: 4 if options.quick else TIMED_STEPS]
    steps = [partial(_step, trainer) for trainer in trainers]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("BERT: steps side by side", total=len(batches))
        speeds = side_by_side(steps, progress.track(batches, task_id=bar))
    for run, step, speed in zip(runs, steps, speeds, strict=True):
        run.speed = speed
        run.memory = peak_bytes(partial(step, batches[0]))
        run.seconds = seconds_by_kind(partial(step, batches[0]))


def _judge(run: Run, stock: Run, corpus: Corpus) -> None:
    """Whether the run learned as much as stock torch's, and something."""
    accuracy, expected = run.metrics["accuracy"], stock.metrics["accuracy"]
    within = tolerance(expected, len(corpus.test))
    learned = accuracy >= corpus.majority + ABOVE_MAJORITY
    run.good = learned and abs(accuracy - expected) <= within
    if run is not stock:
        run.check = f"accuracy within {within:.3f} (two standard errors)"


def _step(trainer: Trainer, batch: dict) -> None:
    trainer.training_step(trainer.model_wrapped, dict(batch))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
    run, compiled = Run(implementation), implementation == COMPILED
    if implementation in (PATCHED, PATCHED_BF16):
        run.report = str(fastattn.patch(model, unpad=True))
        if implementation == PATCHED:
            console.print(run.report)
    if compiled:
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
                logging_steps=LOGGED,
                save_strategy="no",
                report_to=[],
                seed=options.seed,
                data_seed=options.seed,
                use_cpu=not torch.cuda.is_available(),
                bf16=implementation == PATCHED_BF16,
                dataloader_pin_memory=False,
                disable_tqdm=True,
                torch_compile_backend="fastattn" if compiled else None,
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
    if compiled:
        run.report = str(fastattn.compile_report())
        console.print(run.report)
    run.metrics = {name: evaluated[f"eval_{name}"] for name in METRICS}
    run.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return run, trainer
