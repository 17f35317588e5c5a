"""Which calls of a drop-in a kernel takes, and which stay torch's because torch is faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastattn
from fastattn import _products, functional
from fastattn.functional import _served, drop_in
from fastattn.functional._served import unobserved
from fastattn.integrations import sequential

pytestmark = pytest.mark.native
LEAST_WORK = 1 << 25  # what conftest.py sets to 0
LEAST_ATTENTION = 1 << 22


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


def test_the_size_below_which_a_stack_is_small(monkeypatch):
    monkeypatch.setattr(_served, "LEAST_WORK", LEAST_WORK)
    assert _served.small_below(stack()) == LEAST_WORK * 64 // (96 * 128)
    assert _served.small_below(nn.Sequential(nn.ReLU())) == 0


def test_which_small_inputs_are_torchs_at_the_first_look(monkeypatch):
    monkeypatch.setattr(_served, "LEAST_WORK", LEAST_WORK)
    model, x = stack(), torch.randn(4, 64)
    fastattn.patch(model)
    looked = []
    monkeypatch.setattr(sequential, "unobserved", lambda: looked.append(1) or unobserved())

    def first_look(x: torch.Tensor) -> bool:
        looked.clear()
        model(x)
        return not looked

    assert first_look(x)
    assert not first_look(nn.Parameter(x))
    monkeypatch.setattr(_products, "_LACKING", frozenset({torch.float32}))
    assert not first_look(x)


MASK = (torch.arange(16) > 3).expand(16, 16)


@pytest.mark.parametrize(
    ("length", "options", "kernels"),
    [
        (16, {}, False),
        (16, {"attn_mask": MASK}, False),
        (16, {"attn_mask": MASK, "is_causal": True}, True),  # torch takes only one of the two
        (16, {"dropout_p": 0.3}, True),
        (16, {"gradient": True}, True),  # torch's has no second derivative
        (400, {}, True),
    ],
    ids=["small", "mask", "mask and causal", "dropout", "gradient", "large"],
)
def test_small_attentions_are_torchs(monkeypatch, length, options, kernels):
    monkeypatch.setattr(_served, "LEAST_ATTENTION", LEAST_ATTENTION)
    calls = []
    kernel = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda *a, **o: calls.append(a) or kernel(*a, **o),
    )
    q, k, v = torch.randn(3, 1, 2, length, 16)
    q.requires_grad_(options.pop("gradient", False))
    out = drop_in.attention_by_size(q, k, v, **options)
    assert bool(calls) == kernels
    if not options.get("dropout_p"):
        torch.testing.assert_close(out, kernel(q, k, v, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_with_nothing_to_attend_to_is_0_at_any_size(monkeypatch, dtype):
    monkeypatch.setattr(_served, "LEAST_ATTENTION", LEAST_ATTENTION)
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=dtype)
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    out = drop_in.attention_by_size(q, k, v, mask)
    assert not out[:, :, 2].any()
    assert out[:, :, 1].all()


def test_small_attentions_keep_their_derivatives(monkeypatch):
    monkeypatch.setattr(_served, "LEAST_ATTENTION", LEAST_ATTENTION)
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(drop_in.attention_by_size, (q, k, v))
    out, tangent = torch.func.jvp(lambda q: drop_in.attention_by_size(q, k, v), (q,), (k,))
    assert tangent.shape == out.shape
    mapped = torch.func.vmap(drop_in.attention_by_size)(*(x.detach() for x in (q, k, v)))
    torch.testing.assert_close(mapped, out.detach())
