"""sentence-transformers on fastattn: embeddings, and fine-tuning on pairs of neighbours.

``fastattn.patch`` takes a ``SentenceTransformer`` as it is. Two sentences that follow each other in
a module's docstrings are a pair; the loss asks that each sentence finds its neighbour among the
batch's. The embeddings before it and the recall after it, stock beside patched.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers.utils import logging

import fastattn
from fastattn.cli.demo.corpus import load_corpus
from fastattn.cli.pretrained import model_path


def pairs_of(sentences: list) -> list[tuple[str, str]]:
    """Sentences next to each other, of one module."""
    ordered = sorted(sentences, key=lambda s: s.module)
    neighbours = zip(ordered[::2], ordered[1::2], strict=False)
    return [(a.text, b.text) for a, b in neighbours if a.module == b.module]


def recall(model: SentenceTransformer, pairs: list[tuple[str, str]]) -> float:
    """How many sentences have their neighbour among the ten most similar."""
    one, other = (
        model.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True)
        for texts in zip(*pairs, strict=True)
    )
    found = (one @ other.T).topk(min(10, len(pairs))).indices
    return float((found == torch.arange(len(pairs))[:, None]).any(1).float().mean())


def train(model: SentenceTransformer, pairs: list[tuple[str, str]], steps: int) -> float:
    """The seconds of the training."""
    loss_of = MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        some = [pairs[(16 * step + i) % len(pairs)] for i in range(16)]
        features = [model.preprocess(list(texts)) for texts in zip(*some, strict=True)]
        loss_of(features, torch.empty(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a Hugging Face name or path")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    corpus = load_corpus(options.seed, packages=8, train_cap=100, test_cap=60)
    stock = SentenceTransformer(
        model_path(options.model), device="cpu", model_kwargs={"attn_implementation": "sdpa"}
    )
    ours = copy.deepcopy(stock)
    report = fastattn.patch(ours, unpad=True)
    print(str(report).splitlines()[0])
    texts = [s.text for s in corpus.test]
    vectors = []
    for name, model in (("stock", stock), ("patched", ours)):
        start = time.perf_counter()
        vectors.append(model.encode(texts, convert_to_tensor=True, normalize_embeddings=True))
        seconds = time.perf_counter() - start
        print(f"{name}: {len(texts)} sentences in {seconds:.2f} s")
    print(f"least cosine {float((vectors[0] * vectors[1]).sum(-1).min()):.6f}")
    learn, judge = pairs_of(corpus.train), pairs_of(corpus.test)
    for name, model in (("stock", stock), ("patched", ours)):
        before = recall(model, judge)
        torch.manual_seed(options.seed)
        seconds = train(model, learn, options.steps)
        after = recall(model, judge)
        print(f"{name}: recall {before:.3f} before, {after:.3f} after, {seconds:.1f} s")


if __name__ == "__main__":
    main()
