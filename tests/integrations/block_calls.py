"""Blocks with patch and without: values, gradients, the kernels that are called."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastattn


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that are called from here on."""
    seen: list[str] = []
    for name in ("linear", "mlp", "gated_mlp", "dropout_add_norm"):
        whole = getattr(fastattn.functional, name)
        spy = lambda *a, name=name, whole=whole, **o: seen.append(name) or whole(*a, **o)  # noqa: E731
        monkeypatch.setattr(fastattn.functional, name, spy)
    return seen


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    out = model(x)
    t = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return (out, *torch.autograd.grad(out, (x, *model.parameters()), t))


def assert_same(stock: nn.Module, x: Tensor, rtol: float = 1e-9, atol: float = 1e-11) -> nn.Module:
    model = copy.deepcopy(stock)
    report = fastattn.patch(model, dropout=False)
    assert report.swapped
    assert not report.skipped
    results = []
    for m in (model, stock):
        torch.manual_seed(3)
        results.append(gradients(m, x))
    torch.testing.assert_close(*results, rtol=rtol, atol=atol)
    return model
