"""Which calls of a drop-in a kernel takes, and which stay torch's because torch is faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastattn
from fastattn import _products, functional
from fastattn.functional import _served

pytestmark = pytest.mark.native
LEAST_WORK = 1 << 25  # what conftest.py sets to 0


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))


@pytest.mark.parametrize(
    ("rows", "kernels"), [(1, False), (LEAST_WORK // (96 * 128) - 1, False), (3000, True)]
)
def test_small_stacks_are_torchs(monkeypatch, rows, kernels):
    monkeypatch.setattr(_served, "LEAST_WORK", LEAST_WORK)
    calls = []
    kernel = functional.mlp
    monkeypatch.setattr(functional, "mlp", lambda *a: calls.append(a) or kernel(*a))
    model, x = stack(), torch.randn(rows, 64)
    expected = model(x)
    fastattn.patch(model)
    torch.testing.assert_close(model(x), expected)
    assert bool(calls) == kernels


def test_a_dtype_that_torch_has_no_product_for_is_never_too_small(monkeypatch):
    monkeypatch.setattr(_served, "LEAST_WORK", LEAST_WORK)
    x, layers = torch.randn(4, 64), list(stack())
    assert _served.is_small(x, layers)
    monkeypatch.setattr(_products, "_LACKING", frozenset({torch.float32}))
    assert not _served.is_small(x, layers)


def test_other_inputs_than_tensors_on_a_cpu_are_not_judged(monkeypatch):
    monkeypatch.setattr(_served, "LEAST_WORK", LEAST_WORK)
    x = torch.randn(4, 64)
    for given in (None, x.to("meta"), nn.Parameter(x)):
        assert not _served.is_small(given, stack())
