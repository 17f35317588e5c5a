"""A BERT classifier fine-tuned by LoRA (PEFT): stock beside patched.

PEFT puts small matrices beside the frozen weights of q and v. ``fastattn.patch`` comes after it:
the layers that PEFT replaced stay PEFT's, everything around them runs on the kernels, without
padding. The loss of both, step by step from the same start, without dropout, must agree.
(Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".)
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import fastattn
from fastattn.cli.demo.corpus import load_corpus
from fastattn.cli.pretrained import model_path


def train(model: nn.Module, batches: list[dict]) -> tuple[list[float], float]:
    """The losses, and the seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model.train()
    losses, start = [], time.perf_counter()
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[dict]) -> float:
    model.eval()
    right = sum(int((model(**b).logits.argmax(-1) == b["labels"]).sum()) for b in batches)
    return right / sum(len(b["labels"]) for b in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a Hugging Face name or path")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = model_path(options.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    corpus = load_corpus(options.seed, packages=8, train_cap=2 * options.steps, test_cap=40)

    def batches(sentences: list) -> list[dict]:
        rows = (sentences[i : i + 16] for i in range(0, len(sentences), 16))
        return [
            {
                **tokenizer(
                    [s.text for s in some],
                    padding=True,
                    truncation=True,
                    max_length=64,
                    return_tensors="pt",
                ),
                "labels": torch.tensor([s.label for s in some]),
            }
            for some in rows
        ]

    torch.manual_seed(options.seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=len(corpus.packages),
        attn_implementation="sdpa",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )
    config = LoraConfig(TaskType.SEQ_CLS, r=8, target_modules=["query", "value"])
    stock = get_peft_model(base, config)
    ours = copy.deepcopy(stock)
    report = fastattn.patch(ours, unpad=True)
    print(str(report).splitlines()[0])
    curves = []
    for name, model in (("stock", stock), ("patched", ours)):
        losses, seconds = train(model, batches(corpus.train)[: options.steps])
        curves.append(losses)
        right = accuracy(model, batches(corpus.test))
        print(f"{name}: loss {losses[-1]:.4f}, accuracy {right:.3f}, {seconds:.1f} s")
    pairs = list(zip(*curves, strict=True))[:20]
    print(f"first losses within {max(abs(a - b) for a, b in pairs):.1e}")


if __name__ == "__main__":
    main()
