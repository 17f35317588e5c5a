"""Models of torch.nn's layers, what patch makes of them, and a training step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn


def digits() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class Functional(nn.Module):
    """Linear, ReLU in a forward of its own, as a function, a method and a module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, 24), nn.Linear(24, 20), nn.Linear(20, 16)
        self.last, self.act = nn.Linear(16, 10), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x.flatten(1)))
        x = self.two(x).relu()
        return self.last(self.act(self.three(x)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.attention(x, x, x)[0]


MODELS = [
    (digits, {("Sequential", "fastattn FusedSequential"): 1}),
    (lambda: digits()[1:], {("Sequential", "fastattn FusedSequential"): 1}),
    (
        Encoder,
        {
            ("TransformerEncoder", "fastattn TransformerEncoder"): 1,
            ("TransformerEncoderLayer", "fastattn TransformerEncoderLayer"): 2,
            ("MultiheadAttention", "fastattn MultiheadAttention"): 3,
        },
    ),
]
IDS = ["sequential", "mlp", "encoder"]
models = pytest.mark.parametrize("make, counts", MODELS, ids=IDS)


def batch(make: object, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (5, 7, 64) if make is Encoder else (5, 64)
    return torch.randn(shape, dtype=dtype)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters()]


def reason(report: fastattn.PatchReport, name: str) -> str:
    (entry,) = [e for e in report.skipped if e.name == name]
    return entry.reason
