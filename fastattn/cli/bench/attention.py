"""Attention layers of models that everybody trains, on both sides."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn.cli.bench.case import OURS, Case, Run, both_directions
from fastattn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Attention:
    """A layer's attention; ``kind`` is full, causal, padding (half of half the rows), bias
    (learned), dropout (0.1) or window (256 to the left, causal)."""

    model: str
    batch: int
    heads: int
    seq: int
    dim: int
    kind: str = "full"
    heads_k: int = 0
    seq_k: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def keys(self) -> int:
        return self.seq_k or self.seq

    @property
    def name(self) -> str:
        heads = f"{self.heads}/{self.heads_k}" if self.heads_k else str(self.heads)
        length = f"{self.seq}/{self.seq_k}" if self.seq_k else str(self.seq)
        return f"{self.model} {self.batch}x{heads}x{length}x{self.dim} {self.kind}"

    @property
    def flops(self) -> float:
        scores = float(self.seq * self.keys)
        if self.kind == "causal":
            scores /= 2
        elif self.kind == "window":
            scores = float(sum(min(i + 1, 257) for i in range(self.seq)))
        return 4.0 * self.batch * self.heads * scores * self.dim

    def inputs(self) -> list[Tensor]:
        heads_k = self.heads_k or self.heads
        return [
            torch.randn(self.batch, heads, rows, self.dim, dtype=self.dtype)
            for heads, rows in ((self.heads, self.seq), (heads_k, self.keys), (heads_k, self.keys))
        ]

    def functions(self, peers: str) -> dict[str, Callable[..., Tensor]]:
        options: dict[str, object] = {"enable_gqa": bool(self.heads_k)}
        ours = dict(options)
        if self.kind == "causal":
            options["is_causal"] = ours["is_causal"] = True
        elif self.kind == "dropout":
            options["dropout_p"] = ours["dropout_p"] = 0.1
        elif self.kind == "padding":
            lengths = torch.tensor([self.keys, self.keys // 2]).repeat(self.batch)[: self.batch]
            mask = torch.arange(self.keys) < lengths[:, None]
            options["attn_mask"] = ours["attn_mask"] = mask[:, None, None]
        elif self.kind == "window":
            ours |= {"is_causal": True, "window_size": (256, -1)}
            i = torch.arange(self.seq)
            options["attn_mask"] = (i[:, None] >= i) & (i[:, None] - i <= 256)

        def call(function: Callable, options: dict) -> Callable[..., Tensor]:
            if self.kind == "bias":
                return lambda q, k, v, bias: function(q, k, v, bias, **options)
            return lambda q, k, v: function(q, k, v, **options)

        sdpa = F.scaled_dot_product_attention
        found = {
            OURS: call(scaled_dot_product_attention, ours),
            "sdpa": call(sdpa, options),
        }
        if peers == "all":

            def math_path(*inputs: Any, **options: Any) -> Tensor:
                with sdpa_kernel(SDPBackend.MATH):
                    return sdpa(*inputs, **options)

            found["sdpa math"] = call(math_path, options)
            found["torch.compile"] = torch.compile(call(sdpa, options), dynamic=False)
        return found

    def cases(self, peers: str) -> Iterator[Case]:
        size = torch.finfo(self.dtype).bits // 8
        tokens = self.heads * self.seq + (self.heads_k or self.heads) * self.keys
        moved = 2.0 * self.batch * tokens * self.dim * size
        random = self.kind == "dropout"

        def build(direction: str) -> dict[str, Run]:
            inputs = self.inputs()
            if self.kind == "bias":
                inputs.append(torch.randn(1, self.heads, self.seq, self.keys, dtype=self.dtype))
            return both_directions(self.functions(peers), inputs, direction)

        for direction, factor in (("forward", 1.0), ("backward", 2.5)):
            if direction == "backward" and self.seq == 1:
                continue
            yield Case(
                "attention", self.name, self.dtype, direction, factor * self.flops,
                moved * (1 + (direction == "backward")), functools.partial(build, direction),
                seq=self.seq, random=random,
            )  # fmt: skip


def attention_cases(peers: str, grid: bool) -> Iterator[Case]:
    if grid:
        for dtype, dim, seq, kind in itertools.product(
            (torch.float32, torch.bfloat16, torch.float16),
            (32, 64, 128),
            (128, 512, 2048, 4096),
            ("full", "causal"),
        ):
            batch, heads = (4, 12) if seq <= 512 else (1, 8) if seq == 2048 else (1, 2)
            yield from Attention("grid", batch, heads, seq, dim, kind, dtype=dtype).cases(peers)
        return
    for case in (
        Attention("BERT-base", 8, 12, 128, 64),
        Attention("BERT-base", 4, 12, 512, 64),
        Attention("BERT-base", 4, 12, 512, 64, "dropout"),
        Attention("BERT-base", 4, 12, 512, 64, "padding"),
        Attention("BERT-base", 4, 12, 512, 64, dtype=torch.bfloat16),
        Attention("BERT-base", 1, 12, 512, 64, dtype=torch.float16),
        Attention("MiniLM", 8, 12, 128, 32),
        Attention("GPT-2", 1, 12, 1024, 64, "causal"),
        Attention("Llama-like", 1, 32, 512, 128, "causal", heads_k=8),
        Attention("Llama-like decode", 1, 32, 1, 128, "full", heads_k=8, seq_k=4096),
        Attention("Mistral-like", 1, 8, 2048, 64, "window"),
        Attention("ViT-B/16", 8, 12, 197, 64),
        Attention("T5", 4, 8, 512, 64, "bias"),
        Attention("one long head", 1, 1, 4096, 64, "causal"),
    ):
        yield from case.cases(peers)
