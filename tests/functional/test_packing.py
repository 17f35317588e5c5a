"""Weights that are kept packed for inference: every way of changing them that torch counts, memory,
modes in which they are not used."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn import _products
from fastattn.functional import packed_bytes, packing

pytestmark = pytest.mark.native
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _packing():
    fastattn.pack_weights(True)
    yield
    fastattn.pack_weights(False)
    assert packed_bytes() == 0


def linear(x, w, b=None, activation="gelu"):
    return fastattn.linear(x, w, b, activation, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, n_out, n_in", [(100, 70, 40), (300, 64, 900), (2, 9, 70), (9, 1, 3)]
)
def test_the_result_is_the_same_bit_for_bit(dtype, rows, n_out, n_in):
    x, w, b = (torch.randn(*s).to(dtype) for s in ((rows, n_in), (n_out, n_in), (n_out,)))
    wide = torch.randn(n_in, n_out).to(dtype).T  # packed through a copy
    expected = [linear(x, y, b) for y in (w, wide)]
    with torch.no_grad():
        for y, out in zip((w, wide), expected, strict=True):
            assert torch.equal(linear(x, y, b), out)
            assert torch.equal(linear(x, y, b), out)
    found = fastattn.multi_linear(x, [w, wide], [b, None], backend="cpu")
    with torch.no_grad():
        again = fastattn.multi_linear(x, [w, wide], [b, None], backend="cpu")
    assert all(map(torch.equal, found, again))
    assert len(packing._packed) == 2
    size = sum(max(y.numel(), 1) for y in (w, wide)) * (8 if dtype == torch.float64 else 4)
    assert packed_bytes() >= size // (2 if dtype == torch.bfloat16 else 1)


CHANGES = {
    "in place": lambda m: m.weight.mul_(2),
    "an optimizer": lambda m: torch.optim.SGD(m.parameters(), 0.1).step(),
    "a state_dict": lambda m: m.load_state_dict(nn.Linear(64, 48).state_dict()),
    "another memory": lambda m: setattr(m.weight, "data", torch.randn(48, 64)),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(48, 64))),
    "another dtype": lambda m: m.double(),
    "a view of the same memory": lambda m: m.weight.detach().view(-1).neg_(),
    "initialised": lambda m: nn.init.ones_(m.weight),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    model, x = nn.Linear(64, 48), torch.randn(64, 64)
    model.weight.grad, model.bias.grad = torch.ones(48, 64), torch.ones(48)

    def check() -> None:
        at = x.to(model.weight.dtype)
        expected = F.gelu(F.linear(at, model.weight, model.bias))
        torch.testing.assert_close(linear(at, model.weight, model.bias), expected)

    with torch.no_grad():
        check()
        CHANGES[change](model)
        check()


def test_the_panels_end_with_the_weight():
    x, w = torch.randn(64, 64), torch.randn(48, 64)
    with torch.no_grad():
        linear(x, w)
    assert packed_bytes() >= w.nbytes
    del w
    gc.collect()
    assert packed_bytes() == 0


def test_where_they_are_not_used():
    x, w = torch.randn(64, 64), torch.randn(48, 64)
    linear(x, w)  # a gradient may be asked for
    with torch.inference_mode():
        linear(x, torch.randn(48, 64))  # of which torch counts no versions
    with torch.no_grad():
        compiled = torch.compile(lambda x: linear(x, w), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), linear(x, w.clone()))
        torch.func.vmap(lambda x: linear(x, w))(x[None])
        fastattn.pack_weights(False)
        linear(x, w)
    assert packed_bytes() == 0


def test_a_model_that_is_copied_or_saved_takes_no_panels_along():
    model, x = nn.Linear(64, 48), torch.randn(64, 64)
    before = len(pickle.dumps(model))
    with torch.no_grad():
        linear(x, model.weight, model.bias)
        kept = packed_bytes()
        copied = copy.deepcopy(model)
        assert len(pickle.dumps(model)) == before
        assert packed_bytes() == kept
        copied.weight.zero_()
        torch.testing.assert_close(linear(x, copied.weight), torch.zeros(64, 48))
        assert linear(x, model.weight).abs().max() > 0


def test_a_module_takes_them(monkeypatch):
    monkeypatch.setattr(_products, "why_torchs", lambda *_: None)
    monkeypatch.setattr(_products, "least_work", lambda _: 0)
    layer, x = fastattn.nn.Linear(64, 48), torch.randn(64, 64)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert packed_bytes() > 0


def test_bad_input(monkeypatch):
    with pytest.raises(TypeError, match="enabled: expected a bool, got int"):
        fastattn.pack_weights(1)
    monkeypatch.setenv("FASTATTN_PACK_WEIGHTS", "yes")
    with pytest.raises(ValueError, match="FASTATTN_PACK_WEIGHTS: expected 0 or 1, got 'yes'"):
        packing._read_switch()
    w = torch.randn(48, 64)
    for packed in ([torch.empty(3)], [torch.ops.fastattn.pack_weight(w).double()], [w, w]):
        with pytest.raises(RuntimeError, match="linear_forward: packed: expected"):
            torch.ops.fastattn.linear_forward(
                torch.randn(4, 64), [w], [torch.empty(0)], packed, 2, 0.0, None, False
            )
