"""A BERT classifier fine-tuned by the Hugging Face Trainer: stock beside fastattn.

Which package of the standard library does a docstring sentence come from? The same Trainer, data
and seed, once with torch's SDPA and once with fastattn: the model patched, or compiled by
``TrainingArguments(torch_compile_backend="fastattn")``. Accuracy, recall and F1 on sentences of
other modules, and the seconds of the training.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, recall_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

import fastattn
from fastattn.cli.demo.corpus import Sentence, load_corpus
from fastattn.cli.pretrained import model_path
from fastattn.integrations import transformers as fastattn_transformers


def metrics(prediction) -> dict[str, float]:
    truth, predicted = prediction.label_ids, np.argmax(prediction.predictions, axis=-1)
    average = {"average": "macro", "zero_division": 0}
    return {
        "accuracy": accuracy_score(truth, predicted),
        "recall": recall_score(truth, predicted, **average),
        "f1": f1_score(truth, predicted, **average),
    }


def encoded(sentences: list[Sentence], tokenizer) -> list[dict]:
    rows = tokenizer([s.text for s in sentences], truncation=True, max_length=64)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": s.label}
        for ids, mask, s in zip(rows["input_ids"], rows["attention_mask"], sentences, strict=True)
    ]


def fine_tune(how: str, path: str, corpus, options: argparse.Namespace) -> dict[str, float]:
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=len(corpus.packages), attn_implementation="sdpa"
    )
    if how == "patched":
        fastattn.patch(model, unpad=True)
    if how == "compiled":
        fastattn_transformers.register()  # the Trainer asks accelerate for the backend
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=64,
                learning_rate=1e-4,
                save_strategy="no",
                report_to=[],
                seed=options.seed,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=False,
                disable_tqdm=True,
                torch_compile_backend="fastattn" if how == "compiled" else None,
            ),
            train_dataset=encoded(corpus.train, tokenizer),
            eval_dataset=encoded(corpus.test, tokenizer),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=metrics,
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        found = trainer.evaluate()
    return {**{k: found[f"eval_{k}"] for k in ("accuracy", "recall", "f1")}, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fastattn", choices=("patched", "compiled"), default="patched")
    parser.add_argument("--model", help="a Hugging Face name or path")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    caps = (min(100, 2 * options.steps), min(60, 2 * options.steps))
    corpus = load_corpus(options.seed, packages=8, train_cap=caps[0], test_cap=caps[1])
    path = model_path(options.model)
    for how in ("stock", options.fastattn):
        found = fine_tune(how, path, corpus, options)
        print(f"{how}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
