"""What gpu.py times."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Attention(NamedTuple):
    batch: int
    heads: int
    seq: int
    dim: int
    dtype: torch.dtype = torch.bfloat16
    mask: str = "full"  # full, causal, padding, bool, bias

    @property
    def name(self) -> str:
        size = f"{self.batch}x{self.heads}x{self.seq}x{self.dim}"
        return f"attention {size} {str(self.dtype)[6:]} {self.mask}"

    @property
    def flops(self) -> float:
        full = 4.0 * self.batch * self.heads * self.seq**2 * self.dim
        return full / 2 if self.mask == "causal" else full


class SecondOrder(NamedTuple):
    """The kernels of forward mode and of the second derivative beside the first-order ones.

    FLOPs: the tangent 10·B·H·S²·D (five products), the second derivative 24 (twelve).
    """

    batch: int
    heads: int
    seq: int
    dim: int
    dtype: torch.dtype = torch.bfloat16
    mask: str = "full"  # full, causal

    @property
    def name(self) -> str:
        size = f"{self.batch}x{self.heads}x{self.seq}x{self.dim}"
        return f"second order {size} {str(self.dtype)[6:]} {self.mask}"

    @property
    def flops(self) -> float:
        return Attention(*self).flops


class Linear(NamedTuple):
    rows: int
    n_in: int
    n_out: int

    @property
    def name(self) -> str:
        return f"linear+ReLU {self.rows}x{self.n_in}->{self.n_out} bfloat16"

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.n_in * self.n_out


class Step(NamedTuple):
    """A training step of 784-128-10: forward, loss, backward, SGD."""

    rows: int

    @property
    def name(self) -> str:
        return f"MLP step 784-128-10, {self.rows} rows bfloat16"

    @property
    def flops(self) -> float:
        return 3 * 2.0 * self.rows * (784 * 128 + 128 * 10)


ATTENTION = [
    *(Attention(16384 // s, 16, s, 128, mask="causal") for s in (16384, 8192, 4096, 2048)),
    *(Attention(16384 // s, 16, s, 128) for s in (16384, 8192, 4096, 2048)),
    *(Attention(16384 // s, 32, s, 64) for s in (16384, 8192, 4096)),
    Attention(2, 32, 8192, 64, mask="causal"),
    Attention(2, 8, 8192, 256),
    Attention(16, 12, 512, 64, mask="padding"),
    Attention(4, 16, 2048, 64, mask="bool"),
    Attention(4, 16, 2048, 64, mask="bias"),
    Attention(4, 16, 2048, 128, mask="bias"),
    Attention(2, 16, 2048, 64, torch.float32),
    Attention(2, 16, 2048, 64, torch.float32, "causal"),
]
SECOND_ORDER = [
    SecondOrder(2, 16, 8192, 128),
    SecondOrder(2, 16, 8192, 128, mask="causal"),
    SecondOrder(8, 16, 2048, 64),
]
LINEAR = [
    Linear(rows, n_in, n_out)
    for n_in, n_out in ((784, 128), (768, 3072), (4096, 4096), (4096, 11008))
    for rows in (64, 1024, 8192)
]
STEPS = [Step(rows) for rows in (64, 256, 1024)]
