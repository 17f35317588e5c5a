"""Forward mode and the second derivative of attention, beside torch's math path, which alone has
them, and beside our own first-order kernels.

FLOP convention: forward mode 2.5 times the forward (10·B·H·S²·D: five products), the second
derivative with the tangent of the output six times (twelve products); half of it when causal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn import ops
from fastattn.cli.bench.attention import Attention
from fastattn.cli.bench.case import OURS, OURSELVES, Case, Run
from fastattn.functional import scaled_dot_product_attention
from fastattn.verification.shapes import ATTENTION, AttentionShape


def second_order_cases() -> Iterator[Case]:
    heads_of_64 = AttentionShape("heads of 64", 1, 4, 4, 2048, 2048, 64, 64)
    for layer in (
        Attention(ATTENTION["BERT-base, 512 tokens"]._replace(batch=1)),
        Attention(ATTENTION["GPT-2"]._replace(seq_q=512, seq_k=512), "causal"),
        Attention(heads_of_64),
        Attention(heads_of_64, "causal"),
        Attention(AttentionShape("one head", 1, 1, 1, 4096, 4096, 64, 64)),
    ):
        yield from _beside_torch(layer)
        yield from _beside_first_order(layer)


def _case(layer: Attention, note: str, direction: str, factor: float, build, **options) -> Case:
    shape = layer.shape
    moved = 16.0 * shape.batch * shape.heads_q * shape.seq_q * shape.head_dim * factor
    return Case(
        "second_order", f"{layer.name}{note}", layer.dtype, direction, factor * layer.flops, moved,
        build, seq=shape.seq_q, **options,
    )  # fmt: skip


def _beside_torch(layer: Attention) -> Iterator[Case]:
    """What a user calls: torch.func.jvp, the output with its tangent; and the gradient of
    products with the gradients, over a graph that is kept."""

    def functions() -> dict[str, Callable[..., Tensor]]:
        causal: dict[str, Any] = {"is_causal": layer.kind == "causal"}

        def math_path(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, **causal)

        return {
            OURS: lambda q, k, v: scaled_dot_product_attention(q, k, v, **causal),
            "sdpa math": math_path,
        }

    def forward_mode() -> dict[str, Run]:
        inputs, tangents = tuple(layer.inputs()), tuple(layer.inputs())

        def run(function: Callable[..., Tensor]) -> Run:
            return torch.no_grad()(lambda: jvp(function, inputs, tangents))

        return {name: run(function) for name, function in functions().items()}

    def double_backward() -> dict[str, Run]:
        inputs, tangents, cotangent = layer.inputs(), layer.inputs(), layer.inputs()[0]

        def run(function: Callable[..., Tensor]) -> Run:
            leaves = [x.clone().requires_grad_() for x in (*inputs, cotangent)]
            grads = torch.autograd.grad(
                function(*leaves[:3]), leaves[:3], leaves[3], create_graph=True
            )
            return lambda: torch.autograd.grad(grads, leaves, tangents, retain_graph=True)

        return {name: run(function) for name, function in functions().items()}

    yield _case(layer, "", "jvp", 3.5, forward_mode)  # with the output itself
    yield _case(layer, "", "double backward", 6, double_backward)


def _beside_first_order(layer: Attention) -> Iterator[Case]:
    """The kernels alone: the tangent beside the forward, the second derivative beside the
    backward. Here the peer is faster."""
    causal, scale = layer.kind == "causal", layer.shape.head_dim**-0.5

    def build(direction: str) -> dict[str, Run]:
        inputs, tangents = ops.Inputs(*layer.inputs()), ops.Tangents(*layer.inputs())
        cotangents, extras = ops.Cotangents(layer.inputs()[0]), ops.Extras()
        options = ops.Options(causal, scale)
        out, _, *softmax = ops.attention_forward(inputs, extras, options)
        results = ops.Results(out, *softmax)

        def kernel(op: Callable[..., Sequence[Tensor]], *args: object) -> Run:
            return torch.no_grad()(lambda: op(*args))

        if direction == "jvp":
            return {
                OURS: kernel(ops.attention_jvp, inputs, extras, tangents, results, options),
                f"{OURSELVES}forward": kernel(ops.attention_forward, inputs, extras, options),
            }
        return {
            OURS: kernel(
                ops.attention_double_backward, cotangents, inputs, extras, tangents, results,
                options, [True] * 4 + [False],
            ),
            f"{OURSELVES}backward": kernel(
                ops.attention_backward, cotangents, inputs, extras, results, options,
                [True] * 3 + [False],
            ),
        }  # fmt: skip

    for direction, factor in (("jvp", 2.5), ("double backward", 6)):
        yield _case(layer, ", kernel", direction, factor, lambda d=direction: build(d), random=True)
