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
from fastattn.verification.shapes import ATTENTION, AttentionShape


@dataclass(frozen=True)
class Attention:
    """A layer's attention. ``kind`` is full, causal, padding (half of half the rows), bias
    (learned), dropout (0.1) or window (the shape's, causal)."""

    shape: AttentionShape
    kind: str = "full"
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        s = self.shape
        heads = str(s.heads_q) if s.heads_k == s.heads_q else f"{s.heads_q}/{s.heads_k}"
        length = str(s.seq_q) if s.seq_k == s.seq_q else f"{s.seq_q}/{s.seq_k}"
        return f"{s.model} {s.batch}x{heads}x{length}x{s.head_dim} {self.kind}"

    @property
    def flops(self) -> float:
        s = self.shape
        scores = float(s.seq_q * s.seq_k)
        if self.kind == "causal":
            scores /= 2
        elif self.kind == "window":
            scores = float(sum(min(i + 1, self.left + 1) for i in range(s.seq_q)))
        return 4.0 * s.batch * s.heads_q * scores * s.head_dim

    @property
    def left(self) -> int:
        """How many earlier keys a query sees under the window."""
        return self.shape.window_size[0] if self.shape.window_size else -1

    def inputs(self) -> list[Tensor]:
        s = self.shape
        return [
            torch.randn(s.batch, *size, dtype=self.dtype)
            for size in (
                (s.heads_q, s.seq_q, s.head_dim),
                (s.heads_k, s.seq_k, s.head_dim),
                (s.heads_k, s.seq_k, s.head_dim_v),
            )
        ]

    def functions(self, peers: str) -> dict[str, Callable[..., Tensor]]:
        s = self.shape
        options: dict[str, object] = {"enable_gqa": s.heads_k != s.heads_q}
        ours = dict(options)
        if self.kind == "causal":
            options["is_causal"] = ours["is_causal"] = True
        elif self.kind == "dropout":
            options["dropout_p"] = ours["dropout_p"] = 0.1
        elif self.kind == "padding":
            lengths = torch.tensor([s.seq_k, s.seq_k // 2]).repeat(s.batch)[: s.batch]
            mask = torch.arange(s.seq_k) < lengths[:, None]
            options["attn_mask"] = ours["attn_mask"] = mask[:, None, None]
        elif self.kind == "window":
            ours |= {"is_causal": True, "window_size": s.window_size}
            i = torch.arange(s.seq_q)
            options["attn_mask"] = (i[:, None] >= i) & (i[:, None] - i <= self.left)

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
        s, size = self.shape, torch.finfo(self.dtype).bits // 8
        tokens = s.heads_q * s.seq_q + s.heads_k * s.seq_k
        moved = 2.0 * s.batch * tokens * s.head_dim * size
        random = self.kind == "dropout"

        def build(direction: str) -> dict[str, Run]:
            inputs = self.inputs()
            if self.kind == "bias":
                inputs.append(torch.randn(1, s.heads_q, s.seq_q, s.seq_k, dtype=self.dtype))
            return both_directions(self.functions(peers), inputs, direction)

        for direction, factor in (("forward", 1.0), ("backward", 2.5)):
            if direction == "backward" and s.seq_q == 1:
                continue
            yield Case(
                "attention", self.name, self.dtype, direction, factor * self.flops,
                moved * (1 + (direction == "backward")), functools.partial(build, direction),
                seq=s.seq_q, random=random,
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
            shape = AttentionShape("grid", batch, heads, heads, seq, seq, dim, dim)
            yield from Attention(shape, kind, dtype).cases(peers)
        return
    bert = ATTENTION["BERT-base, 512 tokens"]
    for case in (
        Attention(ATTENTION["BERT-base"]),
        Attention(bert),
        Attention(bert, "dropout"),
        Attention(bert, "padding"),
        Attention(bert, dtype=torch.bfloat16),
        Attention(bert._replace(batch=1), dtype=torch.float16),
        Attention(ATTENTION["MiniLM"]),
        Attention(ATTENTION["GPT-2"], "causal"),
        Attention(ATTENTION["Llama-like"], "causal"),
        Attention(ATTENTION["Llama-like decode"]),
        Attention(ATTENTION["Mistral-like"], "window"),
        Attention(ATTENTION["ViT-B/16"]),
        Attention(ATTENTION["T5"], "bias"),
        Attention(ATTENTION["one long head"], "causal"),
    ):
        yield from case.cases(peers)
