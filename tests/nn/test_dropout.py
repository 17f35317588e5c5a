"""fastattn.nn.Dropout: whose numbers it draws, where torch's code runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from function_log import FunctionLog
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import nn as fnn
from fastattn import reference
from fastattn.functional import _served

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(_served, "LEAST_DROPOUT", 8)


def seeded(call, *args: object, seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return call(*args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype):
    x = torch.randn(3, 4, 8).to(dtype).requires_grad_()
    out = seeded(fnn.Dropout(0.3), x)
    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    factor = reference.keep_factor(x, seed, 0.3)
    torch.testing.assert_close(out, x * factor.to(dtype))
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(grad, factor.to(dtype))
    assert set((out == 0).flatten().tolist()) == {True, False}


def test_how_many_are_dropped():
    out = fnn.Dropout(0.1)(torch.ones(1 << 18))
    dropped = (out == 0).double().mean()
    assert abs(dropped - 0.1) < 5 * (0.1 * 0.9 / (1 << 18)) ** 0.5
    assert torch.equal(out.unique(), torch.tensor([0.0, 1 / 0.9]))


def test_the_same_state_gives_the_same_result():
    layer, x = fnn.Dropout(0.5), torch.randn(4, 16, requires_grad=True)
    assert torch.equal(seeded(layer, x), seeded(layer, x))
    assert not torch.equal(seeded(layer, x), seeded(layer, x, seed=6))
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_again(reentrant):
    layer, x = fnn.Dropout(0.5), torch.randn(4, 16, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return layer(layer(x).sin()) * x

    grads = []
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        seeded(call, x).sum().backward()
        grads.append(x.grad)
        x.grad = None
    assert torch.equal(*grads)


class Odd(Tensor):
    pass


TORCHS = {
    "inference": (nn.Dropout(0.5).eval(), torch.randn(4, 8)),
    "in place": (nn.Dropout(0.5, inplace=True), torch.randn(4, 8)),
    "nothing dropped": (nn.Dropout(0.0), torch.randn(4, 8)),
    "all dropped": (nn.Dropout(1.0), torch.randn(4, 8)),
    "small": (nn.Dropout(0.5), torch.randn(7)),
    "float64 of up to twice the size": (nn.Dropout(0.5), torch.randn(15, dtype=torch.float64)),
    "strided": (nn.Dropout(0.5), torch.randn(8, 4).t()),
    "every other one": (nn.Dropout(0.5), torch.randn(8, 8)[:, ::2]),
    "a scalar": (nn.Dropout(0.5), torch.tensor(2.0)),
    "empty": (nn.Dropout(0.5), torch.randn(0, 4)),
    "complex": (nn.Dropout(0.5), torch.randn(4, 8, dtype=torch.complex64)),
    "integers": (nn.Dropout(0.5), torch.arange(32)),
    "a subclass": (nn.Dropout(0.5), torch.randn(4, 8).as_subclass(Odd)),
    "sparse": (nn.Dropout(0.5), torch.eye(8).to_sparse()),
    "meta": (nn.Dropout(0.5), torch.randn(4, 8, device="meta")),
    "none": (nn.Dropout(0.5), None),
}


@pytest.mark.parametrize("name", TORCHS)
def test_torchs_code_runs(name):
    stock, x = TORCHS[name]
    layer = fnn.Dropout(stock.p, stock.inplace).train(stock.training)
    outcomes = []
    for m in (layer, stock):
        try:
            out = seeded(m, x.clone() if stock.inplace else x)
            assert out.is_meta or out.is_sparse or type(out) is type(x)
            outcomes.append((str(out), out.stride() if not out.is_sparse else None))
        except (RuntimeError, TypeError, NotImplementedError) as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_a_function_that_was_replaced(monkeypatch):
    monkeypatch.setattr(F, "dropout", lambda x, *_: x + 1)
    assert torch.equal(fnn.Dropout(0.5)(torch.ones(4, 8)), torch.full((4, 8), 2.0))


def test_probabilities_that_are_set_later():
    layer, x = fnn.Dropout(0.5), torch.ones(64)
    layer.p = 0.25
    assert torch.equal(layer(x).unique(), torch.tensor([0, 1 / 0.75]))
    layer.p = 2.0
    with pytest.raises(ValueError, match="between 0 and 1"):
        layer(x)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fnn.Dropout(-0.1)


def test_transforms_and_second_derivatives():
    layer, x = fnn.Dropout(0.5), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    for randomness in ("same", "different"):
        mapped = [torch.vmap(m, randomness=randomness) for m in (layer, nn.Dropout(0.5))]
        assert torch.equal(*(seeded(call, x.detach()) for call in mapped))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(layer)(x.detach())
    (first,) = torch.autograd.grad(seeded(layer, x.sin()).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    kept = seeded(layer, torch.ones_like(x))
    expected = 2 * (kept * x.cos()) ** 2 - 2 * kept**2 * x.sin() ** 2
    torch.testing.assert_close(second, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tools():
    layer, x = fnn.Dropout(0.5), torch.randn(4, 8)
    model = nn.Sequential(nn.Identity(), layer)
    assert [n.op for n in fx.symbolic_trace(model).graph.nodes].count("call_module") == 2
    traced = torch.jit.trace(model, x, check_trace=False)
    assert "aten::dropout" in [node.kind() for node in traced.inlined_graph.nodes()]
    assert seeded(torch.jit.script(model), x).shape == x.shape
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(seeded(compiled, x), seeded(layer, x))
    assert torch.equal(torch.export.export(model.eval(), (x,)).module()(x), x)


def test_a_function_mode_sees_what_it_saw(monkeypatch):
    x = torch.randn(4, 8)
    for size in (8, 1 << 20):
        monkeypatch.setattr(_served, "LEAST_DROPOUT", size)
        seen = []
        for layer in (fnn.Dropout(0.5), nn.Dropout(0.5)):
            with FunctionLog() as log:
                layer(x)
            seen.append(log.seen)
        assert seen[0] == seen[1]


def test_copies_and_names():
    layer = fnn.Dropout(0.5)
    assert repr(layer) == repr(nn.Dropout(0.5))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is fnn.Dropout
        assert twin.p == 0.5


def test_in_stacks():
    """Stacks that fuse a dropout know ours as well as torch's."""
    model = fnn.MLP(8, 16, 4, activation="gelu", p=0.5).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = seeded(model, x)
    assert fastattn.patch(model).counts["Dropout", "fastattn Dropout"] == 1
    assert torch.equal(seeded(model, x), expected)
