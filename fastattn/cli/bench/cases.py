"""What is timed: layers of models that everybody trains, on both sides.

FLOP convention: attention forward 4·B·H·Sq·Sk·D, half of it when causal (the window's share under a
window), backward 2.5 times the forward; a linear layer 2·M·N·K, backward twice that. Bytes count
every input and result once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn.functional import linear_relu, mlp, scaled_dot_product_attention
from fastattn.integrations import compiler
from fastattn.integrations.torch_nn import patch

Run = Callable[[], Sequence[Tensor]]
OURS = "fastattn"


@dataclass(frozen=True)
class Case:
    """One call. ``build`` makes the implementations, ours and the peers, on the same tensors."""

    op: str
    name: str
    dtype: torch.dtype
    direction: str  # forward, backward, step, jvp or double backward
    flops: float
    bytes: float
    build: Callable[[], dict[str, Run]] = field(repr=False, compare=False)
    seq: int = 0  # what the speed is plotted over
    random: bool = False  # dropout: the results differ

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.name, str(self.dtype)[6:], self.direction


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

            def math_path(*inputs: Tensor, **options: object) -> Tensor:
                with sdpa_kernel(SDPBackend.MATH):
                    return sdpa(*inputs, **options)

            found["sdpa math"] = call(math_path, options)
            found["torch.compile"] = torch.compile(call(sdpa, options), dynamic=False)
        return found

    def cases(self, peers: str) -> Iterator[Case]:
        size = torch.finfo(self.dtype).bits // 8
        tokens = self.heads * self.seq + (self.heads_k or self.heads) * self.keys
        moved = 2.0 * self.batch * tokens * self.dim * size
        shared = {"seq": self.seq, "random": self.kind == "dropout"}

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
                moved * (1 + (direction == "backward")), lambda d=direction: build(d), **shared,
            )  # fmt: skip


def both_directions(
    functions: dict[str, Callable[..., Tensor]],
    inputs: list[Tensor],
    direction: str,
    dead: Tensor | None = None,
) -> dict[str, Run]:
    """The forward without autograd, or the backward alone over a graph that is kept. Where ``dead``
    is True the output's gradient is 0."""

    def forward(function: Callable[..., Tensor]) -> Run:
        @torch.no_grad()
        def run() -> Sequence[Tensor]:
            return [function(*inputs)]

        return run

    def backward(function: Callable[..., Tensor]) -> Run:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        if dead is not None:
            cotangent.masked_fill_(dead, 0.0)
        return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)

    wrap = forward if direction == "forward" else backward
    return {name: wrap(function) for name, function in functions.items()}


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


def linear_cases(peers: str) -> Iterator[Case]:
    shapes = (
        ("digits", 64, 784, 128),
        ("digits", 1024, 784, 128),
        ("BERT-base", 128, 768, 3072),
        ("BERT-base", 1024, 768, 3072),
        ("MiniLM", 1024, 384, 1536),
        ("one row", 1, 768, 3072),
    )
    for model, rows, n_in, n_out in shapes:

        def build(direction: str, rows=rows, n_in=n_in, n_out=n_out) -> dict[str, Run]:
            weight, bias = torch.randn(n_out, n_in) / n_in**0.5, torch.randn(n_out)
            functions = {OURS: linear_relu, "eager": lambda x, w, b: F.relu(F.linear(x, w, b))}
            if peers == "all":
                functions["torch.compile"] = torch.compile(functions["eager"], dynamic=False)
                if direction == "forward" and torch.backends.mkldnn.is_available():
                    functions["oneDNN fused"] = lambda x, w, b: torch.ops.mkldnn._linear_pointwise(
                        x, w, b, "relu", [], ""
                    )
            x = torch.randn(rows, n_in)
            # Of a sum that is about 0 the rounding decides what passes the ReLU.
            dead = F.linear(x, weight, bias).abs() < 1e-4
            return both_directions(functions, [x, weight, bias], direction, dead)

        flops = 2.0 * rows * n_in * n_out
        moved = 4.0 * (rows * n_in + n_in * n_out + rows * n_out)
        for direction, factor in (("forward", 1), ("backward", 2)):
            yield Case(
                "linear_relu", f"{model} {rows}x{n_in}->{n_out}", torch.float32, direction,
                factor * flops, factor * moved, lambda d=direction, b=build: b(d),
            )  # fmt: skip


def mlp_cases(peers: str) -> Iterator[Case]:
    for rows in (64, 1024):
        widths = (784, 128, 10)
        flops = sum(2.0 * rows * a * b for a, b in itertools.pairwise(widths))
        moved = 4.0 * (rows * sum(widths) + sum(a * b for a, b in itertools.pairwise(widths)))
        name = f"784-128-10, batch {rows}"

        def functions(rows=rows) -> dict[str, Run]:
            net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
            w, b = [net[0].weight.data, net[2].weight.data], [net[0].bias.data, net[2].bias.data]
            x = torch.randn(rows, 784)

            @torch.no_grad()
            def ours() -> Sequence[Tensor]:
                return [mlp(x, w, b)]

            @torch.no_grad()
            def eager() -> Sequence[Tensor]:
                return [F.linear(F.relu(F.linear(x, w[0], b[0])), w[1], b[1])]

            return {OURS: ours, "eager": eager}

        def step(rows=rows) -> dict[str, Run]:
            net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
            x, target = torch.randn(rows, 784), torch.randint(0, 10, (rows,))

            def loss(net: nn.Module) -> Tensor:
                return F.cross_entropy(net(x), target)

            return training_steps(net, loss, peers, lr=0.01)

        yield Case("mlp", name, torch.float32, "forward", flops, moved, functions)
        # The input needs no gradient: the first layer's backward is one product.
        backward = 2 * flops - 2.0 * rows * widths[0] * widths[1]
        yield Case("mlp", f"{name}, SGD", torch.float32, "step", flops + backward, 3 * moved, step)


def training_steps(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    peers: str,
    lr: float,
    compiled: bool = False,
) -> dict[str, Run]:
    """Whole SGD steps of ``model``, ours on a copy that is patched, or ``compiled`` with our
    backend. They return the parameters."""

    def step(model: nn.Module, call: Callable | None = None) -> Run:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)

        def run() -> Sequence[Tensor]:
            optimizer.zero_grad()
            loss(model if call is None else call).backward()
            optimizer.step()
            return [p.detach() for p in model.parameters()]

        return run

    stock, ours = copy.deepcopy(model), copy.deepcopy(model)
    if compiled:
        call = torch.compile(ours, backend=compiler.backend)
    else:
        patch(ours)
        call = None
    found = {OURS: step(ours, call), "eager": step(stock)}
    if peers == "all":
        inductor = copy.deepcopy(model)
        found["torch.compile"] = step(inductor, torch.compile(inductor, dynamic=False))
    return found


def cases(ops: Sequence[str], peers: str, grid: bool) -> Iterator[Case]:
    for op in ops:
        if op == "attention":
            yield from attention_cases(peers, grid)
        elif op == "linear_relu":
            yield from linear_cases(peers)
        elif op == "mlp":
            yield from mlp_cases(peers)
        elif op == "second_order":
            from fastattn.cli.bench.second_order import second_order_cases

            yield from second_order_cases()
        else:
            from fastattn.cli.bench.models import model_cases

            yield from model_cases(peers)
