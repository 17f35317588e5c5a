"""Sizes of real models' layers, by name: the benchmark times them, the tests check them."""

from __future__ import annotations

from typing import Literal, NamedTuple


class AttentionShape(NamedTuple):
    """Query ``[batch, heads_q, seq_q, head_dim]``, key ``[batch, heads_k, seq_k, head_dim]``,
    value ``[batch, heads_k, seq_k, head_dim_v]``."""

    model: str
    batch: int
    heads_q: int
    heads_k: int
    seq_q: int
    seq_k: int
    head_dim: int
    head_dim_v: int
    is_causal: bool = False
    window_size: tuple[int, int] | None = None


class LinearShape(NamedTuple):
    """Input ``[m, k]``, weight ``[n, k]``."""

    model: str
    m: int
    k: int
    n: int


class NormShape(NamedTuple):
    """Rows ``[m, n]``; kind: "layer" or "rms"."""

    model: str
    m: int
    n: int
    kind: Literal["layer", "rms"]


ATTENTION = {
    "BERT-base": AttentionShape("BERT-base", 8, 12, 12, 128, 128, 64, 64),
    "BERT-base, 512 tokens": AttentionShape("BERT-base", 4, 12, 12, 512, 512, 64, 64),
    "MiniLM": AttentionShape("MiniLM", 8, 12, 12, 128, 128, 32, 32),
    "GPT-2": AttentionShape("GPT-2", 1, 12, 12, 1024, 1024, 64, 64, is_causal=True),
    "Llama-like": AttentionShape("Llama-like", 1, 32, 8, 512, 512, 128, 128, is_causal=True),
    "Llama-like decode": AttentionShape("Llama-like decode", 1, 32, 8, 1, 4096, 128, 128),
    "Mistral-like": AttentionShape(
        "Mistral-like", 1, 8, 8, 2048, 2048, 64, 64, is_causal=True, window_size=(256, -1)
    ),
    "ViT-B/16": AttentionShape("ViT-B/16", 8, 12, 12, 197, 197, 64, 64),
    "T5": AttentionShape("T5", 4, 8, 8, 512, 512, 64, 64),
    "one long head": AttentionShape("one long head", 1, 1, 1, 4096, 4096, 64, 64, is_causal=True),
}
DIGITS = (784, 128, 10)  # the widths of the digit classifier
LINEAR = {
    "digits, 64 rows": LinearShape("digits", 64, *DIGITS[:2]),
    "digits": LinearShape("digits", 1024, *DIGITS[:2]),
    "BERT-base, 128 rows": LinearShape("BERT-base", 128, 768, 3072),
    "BERT-base": LinearShape("BERT-base", 1024, 768, 3072),
    "MiniLM": LinearShape("MiniLM", 1024, 384, 1536),
    "one row": LinearShape("one row", 1, 768, 3072),
}
NORM = {
    "BERT-base": NormShape("BERT-base", 1024, 768, "layer"),
    "MiniLM": NormShape("MiniLM", 2048, 384, "layer"),
    "Llama-like": NormShape("Llama-like", 512, 2048, "rms"),
}
