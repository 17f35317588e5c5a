"""Blocks of transformers with forwards of their own, for random models that are compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from random_models import Draw, Parts
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu by tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu written": lambda z: (
        0.5 * z * (1.0 + torch.tanh(0.7978845608 * (z + 0.044715 * torch.pow(z, 3.0))))
    ),
    "silu": F.silu,
    "silu in place": lambda z: F.silu(z, inplace=True),
    "quick gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu squared": lambda z: F.relu(z).square(),
    "tanh": torch.tanh,
}


class Block(nn.Module):
    """Two layers, a norm, and what happens between them."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        width = draw.width
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.p = draw.rng.choice((0.0, 0.3, 1.0))
        self.name = draw.one_of("activation", ACTIVATIONS)
        self.tapped = draw.chance("read inside", 0.2)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def act(self, z: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](z)


class FeedForward(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.first(x))
        out = self.second(self.drop(hidden))
        return out + hidden.mean() if self.tapped else out


class GatedMLP(Block):
    def forward(self, x: Tensor) -> Tensor:
        up = self.second(x)
        out = self.act(self.first(x)) * up
        return self.drop(out) + up if self.tapped else self.drop(out)


class PostNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(self.first(x)) + x)


class PreNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.first(x))
        out = self.norm(x)
        return out + x if self.tapped else out


class RMSNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x) if self.tapped else x
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.norm.weight * x.to(dtype)


class Heads(Block):
    """Two layers on what a third computes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(x))
        q, k = self.first(x), self.second(x)
        return q.transpose(-1, -2).reshape(x.shape) + k


BLOCKS: Parts = {
    kind.__name__: lambda draw, shared, kind=kind: kind(draw)
    for kind in (FeedForward, GatedMLP, PostNorm, PreNorm, RMSNorm, Heads)
}
