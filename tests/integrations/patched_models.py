"""The models that tests of patch use, their input and a loss."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


@functools.cache
def batch() -> Tensor:
    """``[2, 5, 8]``"""
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS = {"stack": stack, "encoder": encoder}


def loss(out: Tensor) -> Tensor:
    """One that a LayerNorm at the end leaves dependent on the weights."""
    return (out.sin() * batch()).sum()


def gradients(model: nn.Module) -> tuple[Tensor, ...]:
    return tuple(p.grad for p in model.parameters() if p.grad is not None)


def gradients_in_a_batch(model: nn.Module) -> object:
    x = batch().clone().requires_grad_()
    out = model(x).sin().sum((0, 1))
    return torch.autograd.grad(out, x, torch.eye(8), is_grads_batched=True)[0]
