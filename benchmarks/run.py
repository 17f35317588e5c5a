"""Paired timings against torch: each pair is taken back to back, the ratio pair by pair.

Each case is checked against torch first; a case that is wrong prints no speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastattn

Case = tuple[str, float, Callable[[], Tensor], Callable[[], Tensor]]


def with_backward(function: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        out = function()
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        return torch.cat([g.flatten() for g in grads])

    return run


def attention_cases() -> list[Case]:
    """Forward 4·B·H·S²·D flops, halved for causal; backward 2.5 times that."""
    cases: list[Case] = []
    for batch, heads, seq, dim in ((4, 12, 128, 64), (4, 12, 512, 64), (1, 12, 2048, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            for causal in (False, True):
                q, k, v = (torch.randn(batch, heads, seq, dim, dtype=dtype) for _ in range(3))
                flops = 4 * batch * heads * seq * seq * dim / (2 if causal else 1)
                name = f"attention {batch}x{heads}x{seq}x{dim} {str(dtype)[6:]}"
                name += " causal" if causal else ""

                def theirs(q=q, k=k, v=v, causal=causal) -> Tensor:
                    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

                def ours(q=q, k=k, v=v, causal=causal) -> Tensor:
                    return fastattn.scaled_dot_product_attention(q, k, v, is_causal=causal)

                cases.append((f"{name} forward", flops, theirs, ours))
                if seq > 512:
                    continue
                leaves = [x.requires_grad_() for x in (q, k, v)]
                pair = with_backward(theirs, leaves), with_backward(ours, leaves)
                cases.append((f"{name} forward+backward", 3.5 * flops, *pair))
    return cases


def linear_cases() -> list[Case]:
    cases: list[Case] = []
    for rows, n_in, n_out in ((64, 784, 128), (1024, 768, 3072)):
        x, w, b = torch.randn(rows, n_in), torch.randn(n_out, n_in), torch.randn(n_out)
        leaves = [t.requires_grad_() for t in (x, w, b)]

        def theirs(x=x, w=w, b=b) -> Tensor:
            return F.relu(F.linear(x, w, b))

        def ours(x=x, w=w, b=b) -> Tensor:
            return fastattn.linear_relu(x, w, b)

        name, flops = f"linear+ReLU {rows}x{n_in}->{n_out} float32", 2.0 * rows * n_in * n_out
        cases.append((f"{name} forward", flops, theirs, ours))
        pair = with_backward(theirs, leaves), with_backward(ours, leaves)
        cases.append((f"{name} forward+backward", 3 * flops, *pair))
    return cases


def roofline() -> float:
    """Flop/s of torch's large float32 matrix product: a floor of the machine's peak."""
    a = torch.randn(2048, 2048)
    seconds = min(timed(lambda: a @ a) for _ in range(10))
    return 2 * 2048**3 / seconds


def timed(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def agrees(theirs: Tensor, ours: Tensor) -> bool:
    tolerance = 0.05 if theirs.dtype == torch.bfloat16 else 1e-3
    return bool(((theirs - ours).abs() <= tolerance * (1 + theirs.abs().max())).all())


def main(pairs: int = 15) -> None:
    torch.manual_seed(0)
    peak = roofline()
    table = Table(title=f"{torch.get_num_threads()} threads, matmul {peak / 1e9:.0f} GFLOP/s")
    for column in ("case", "GFLOP/s", "% of matmul", "torch / ours", "quartiles"):
        table.add_column(column)
    for name, flops, theirs, ours in attention_cases() + linear_cases():
        if not agrees(theirs(), ours()):
            table.add_row(name, "wrong result", "", "", "")
            continue
        seconds = [(timed(theirs), timed(ours)) for _ in range(pairs)]
        ratios = sorted(a / b for a, b in seconds)
        low, _, high = statistics.quantiles(ratios, n=4)
        speed = flops / statistics.median(b for _, b in seconds)
        table.add_row(
            name,
            f"{speed / 1e9:.0f}",
            f"{100 * speed / peak:.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{low:.2f}-{high:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
