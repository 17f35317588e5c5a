"""Whole layers and models: a BERT layer, a BERT, a GPT whose attention is written out."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.cli.bench.case import OURS, Case, Run, both_directions, training_steps
from fastattn.integrations.torch_nn import patch
from fastattn.verification.shapes import ATTENTION, LINEAR


def model_cases(peers: str) -> Iterator[Case]:
    yield from encoder_cases(peers)
    yield from bert_cases()
    yield from gpt_cases(peers)


def encoder_cases(peers: str) -> Iterator[Case]:
    shape, (_, _, dim, hidden) = ATTENTION["BERT-base"], LINEAR["BERT-base"]
    batch, seq, heads = shape.batch, shape.seq_q, shape.heads_q
    flops = 2.0 * batch * seq * (4 * dim * dim + 2 * dim * hidden) + 4.0 * batch * seq * seq * dim
    moved = 4.0 * (4 * dim * dim + 2 * dim * hidden + 10 * batch * seq * dim)
    for dropout, training in ((0.1, True), (0.1, False)):

        def build(dropout=dropout, training=training) -> dict[str, Run]:
            layer = nn.TransformerEncoderLayer(
                dim, heads, hidden, dropout, "gelu", batch_first=True
            )
            x = torch.randn(batch, seq, dim)
            if training:
                return training_steps(layer, lambda m: m(x).square().mean(), peers, lr=1e-4)
            layer.eval()
            ours = copy.deepcopy(layer)
            patch(ours)
            modules: dict[str, Callable[..., Tensor]] = {OURS: ours, "eager": layer}
            return both_directions(modules, [x], "forward")

        kind = "step" if training else "forward"
        yield Case(
            "encoder", f"BERT-base layer {batch}x{seq}, dropout {dropout if training else 0}",
            torch.float32, kind, flops * (3 if training else 1), moved * (3 if training else 1),
            build, random=training,
        )  # fmt: skip


def bert_cases() -> Iterator[Case]:
    """A whole BERT of MiniLM's size, half of its rows half padded, beside Hugging Face's sdpa."""
    if importlib.util.find_spec("transformers") is None:
        return
    shape, (_, _, dim, hidden) = ATTENTION["MiniLM"], LINEAR["MiniLM"]
    batch, seq, layers, heads = shape.batch, 512, 6, shape.heads_q

    def build() -> dict[str, Run]:
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=hidden, attn_implementation="sdpa",
        )  # fmt: skip
        stock = BertModel(config, add_pooling_layer=False).eval()
        ours = copy.deepcopy(stock)
        patch(ours)
        ids = torch.randint(0, config.vocab_size, (batch, seq))
        mask = torch.ones(batch, seq, dtype=torch.long)
        mask[1::2, seq // 2 :] = 0

        def run(model: nn.Module) -> Run:
            @torch.no_grad()
            def forward() -> Sequence[Tensor]:
                # Padded positions hold what the implementation leaves there.
                return [model(ids, attention_mask=mask).last_hidden_state[mask.bool()]]

            return forward

        return {OURS: run(ours), "eager": run(stock)}

    tokens = batch * seq
    dense = 2.0 * tokens * (4 * dim * dim + 2 * dim * hidden)
    attention = 4.0 * batch * seq * seq * dim
    moved = 4.0 * layers * (4 * dim * dim + 2 * dim * hidden + 10 * tokens * dim)
    yield Case(
        "encoder", f"MiniLM {batch}x{seq}, half padded", torch.float32, "forward",
        layers * (dense + attention), moved, build,
    )  # fmt: skip


class _Block(nn.Module):
    """A GPT's block, its attention written out as softmax(QKᵀ/√d)V beside a causal mask."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.hidden: Tensor
        self.register_buffer("hidden", torch.ones(length, length, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(self.hidden[:length, :length], -math.inf)
        mixed = F.softmax(scores, dim=-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Gpt(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, length: int, words: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, length) for _ in range(layers)))
        self.head = nn.Linear(width, words)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.blocks(x))


def gpt_cases(peers: str) -> Iterator[Case]:
    """Training steps of a GPT on characters, ours through torch.compile(backend="fastattn")."""
    layers, width, heads, batch, length, words = 4, 192, 6, 8, 256, 96

    def build() -> dict[str, Run]:
        model = _Gpt(layers, width, heads, length, words)
        ids = torch.randint(words, (batch, length + 1))

        def loss(call: nn.Module) -> Tensor:
            return F.cross_entropy(call(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

        return training_steps(model, loss, peers, lr=0.01, compiled=True)

    tokens = batch * length
    dense = 2.0 * tokens * width * (layers * 12 * width + words)
    attention = layers * 2.0 * tokens * length * width  # causal
    moved = 4.0 * (12 * layers * width * width + 20 * layers * tokens * width)
    yield Case(
        "encoder", f"GPT {layers}x{width}, {batch}x{length}, attention written out, compiled",
        torch.float32, "step", 3 * (dense + attention), 3 * moved, build,
    )  # fmt: skip
