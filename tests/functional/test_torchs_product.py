"""Linear layers on a processor on which torch multiplies faster: its product, with the kernels'
activation and dropout behind it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from layer_calls import ACTIVATIONS, draw, linear

import fastattn
from fastattn import _products

pytestmark = pytest.mark.native
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture
def torchs_product(monkeypatch):
    """As on a processor on which torch multiplies faster."""
    monkeypatch.setattr(_products, "torch_multiplies", lambda _: True)


@pytest.mark.parametrize("activation, p", [*itertools.product(ACTIVATIONS, [0.0, 0.3])])
def test_a_product_by_torch(torchs_product, activation, p):
    x, w, b = (draw(*s).requires_grad_() for s in ((7, 5), (70, 5), (70,)))
    with torch.random.fork_rng():
        torch.manual_seed(11)
        out = fastattn.linear(x, w, b, activation, p)
    expected, t = linear(x, w, b, activation, p), draw(7, 70)
    torch.testing.assert_close(out, expected, **CLOSE)
    found, wanted = (torch.autograd.grad(o, (x, w, b), t) for o in (out, expected))
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_a_relu_behind_torchs_product_is_torchs(torchs_product):
    x, w, v = torch.randn(4, 8), torch.randn(6, 8), torch.randn(3, 6)
    expected = F.relu(F.linear(x, w))
    assert torch.equal(fastattn.linear_relu(x, w), expected)
    assert torch.equal(fastattn.mlp(x, [w, v]), F.linear(expected, v))
    for op, args in (("linear_relu", (x, w)), ("mlp", (x, [w, v]))):
        assert fastattn.backends.explain(op, *args).backend == "torch"
        assert fastattn.backends.explain(op, *args, backend="cpu").backend == "cpu"
    assert not torch.equal(fastattn.linear_relu(x * 1e-3, w, backend="cpu"), expected)
    with pytest.raises(ValueError, match="weight: expected in_features 8"):
        fastattn.linear_relu(x, v)
    with pytest.raises(ValueError, match="weight 1: expected in_features 6"):
        fastattn.mlp(x, [w, w])


def test_activation_dropout_of_any_shape():
    for shape in ((), (0,), (3, 0), (0, 3), (2, 3, 700)):
        x = torch.randn(shape, requires_grad=True)
        if not shape:
            with pytest.raises(ValueError, match="input: expected at least 1 dimension"):
                fastattn.activation_dropout(x, "gelu")
            continue
        out = fastattn.activation_dropout(x, "gelu", 0.5)
        kept = out != 0
        torch.testing.assert_close(out[kept], 2 * F.gelu(x)[kept])
        (found,) = torch.autograd.grad(out.sum(), x)
        (expected,) = torch.autograd.grad((2 * F.gelu(x))[kept].sum(), x)
        torch.testing.assert_close(found, expected)
    x = torch.randn(3, 4, 5).transpose(0, 2)
    torch.testing.assert_close(fastattn.activation_dropout(x, "silu"), F.silu(x))
    assert fastattn.activation_dropout(x) is x
