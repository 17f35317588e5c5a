"""Activations, dropout, gated MLPs and layers on one input through
torch.compile(backend="fastattn")."""

from __future__ import annotations

import math
from collections.abc import Callable

import compiled
import pytest
import torch
import torch.nn.functional as F
from compiled import (  # noqa: F401
    assert_same,
    fused,
    kernel_calls,
    no_graph_of_another_test,
    torchs_draws,
    unsupported,
)
from torch import Tensor, nn

import fastattn
from fastattn import _products
from fastattn.functional import _served
from fastattn.integrations.graph.activations import find_activation

pytestmark = compiled.MARKS
ROOT = math.sqrt(2.0 / math.pi)


def new_gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1.0 + torch.tanh(ROOT * (z + 0.044715 * torch.pow(z, 3.0))))


ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "gelu": ("gelu", F.gelu),
    "gelu, module": ("gelu", nn.GELU()),
    "gelu by tanh": ("gelu_tanh", lambda z: F.gelu(z, approximate="tanh")),
    "gelu written by erf": ("gelu", lambda z: z * 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0)))),
    "NewGELU": ("gelu_tanh", new_gelu),
    "FastGELU": (
        "gelu_tanh",
        lambda z: 0.5 * z * (1.0 + torch.tanh(z * 0.7978845608 * (1.0 + 0.044715 * z * z))),
    ),
    "silu": ("silu", F.silu),
    "silu in place": ("silu", nn.SiLU(inplace=True)),
    "silu written": ("silu", lambda z: z.sigmoid() * z),
    "quick gelu": ("quick_gelu", lambda z: z * torch.sigmoid(1.702 * z)),
    "relu squared": ("relu2", lambda z: torch.square(F.relu(z))),
    "relu to the second": ("relu2", lambda z: torch.relu_(z) ** 2),
}


@pytest.fixture
def products_win(monkeypatch) -> None:
    monkeypatch.setattr(_products, "why_swap", lambda *_: "it was said to be faster")
    monkeypatch.setattr(_products, "why_torchs", lambda *_: None)


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_a_layer_and_its_activation_are_one_call(case, kernel_calls):  # noqa: F811
    name, activation = ACTIVATIONS[case]
    layer = nn.Linear(20, 16)
    assert_same(
        lambda x: activation(layer(x)), torch.randn(5, 20), parameters=list(layer.parameters())
    )
    assert fused() == kernel_calls == ["linear"]
    assert fastattn.compile_report().swapped[0].before == f"linear, {name}"


@pytest.mark.parametrize(
    ("follows", "reason"),
    [
        (lambda z: z * torch.sigmoid(1.7 * z), "no activation with a kernel after it"),
        (lambda z: 0.5 * z * (1.0 + torch.tanh(ROOT * (z + 0.04 * z**3))), "no activation"),
        (lambda z: F.gelu(2 * z), "no activation with a kernel after it"),
        (lambda z: F.silu(z, inplace=True) + z, "add reads it as well as the SiLU"),
        (lambda z: F.gelu(z) + z.sum(), "sum reads it as well as the GELU"),
        (lambda z: (z * (s := torch.sigmoid(z))) + s, "add reads it as well as the SiLU"),
        (lambda z: F.silu(z.double()), "no activation with a kernel after it"),
        (lambda z: torch.add(z, z, alpha=2), "no activation with a kernel after it"),
    ],
)
def test_what_is_no_activation_or_is_read_by_others(follows, reason):
    layer = nn.Linear(20, 16)
    assert_same(
        lambda x: follows(layer(x)), torch.randn(5, 20), parameters=list(layer.parameters())
    )
    assert not fused()
    assert reason in unsupported()


def test_the_values_of_every_formula(kernel_calls):  # noqa: F811
    """The name that a formula gets is that of a function with its values."""
    z = torch.linspace(-5, 5, 501, dtype=torch.float64)
    for name, activation in ACTIVATIONS.values():
        found = []

        def look(gm, inputs, found=found):
            (x,) = gm.graph.find_nodes(op="placeholder")
            found.append(find_activation(x))
            return gm.forward

        torch.compiler.reset()
        out = torch.compile(activation, backend=look)(z.clone())
        assert found[0].name == name
        assert not found[0].others
        torch.testing.assert_close(fastattn.activation_dropout(z, name), out)


@pytest.mark.parametrize("activation", [torch.relu, F.gelu, None])
def test_dropout_behind_a_layer(activation, torchs_draws):  # noqa: F811
    layers = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 16))

    def call(x: Tensor) -> Tensor:
        hidden = layers[0](x)
        hidden = F.dropout(activation(hidden) if activation else hidden, 0.4)
        return layers[1](F.dropout(hidden, 0.3, training=False))

    assert_same(call, torch.randn(5, 20), parameters=list(layers.parameters()))
    assert fused() == ["linear" if activation else "activation_dropout"]


def test_dropout_beside_another_reader(torchs_draws):  # noqa: F811
    layer = nn.Linear(20, 16)

    def call(x: Tensor) -> Tensor:
        hidden = F.gelu(layer(x))
        return F.dropout(hidden, 0.4) + hidden

    assert_same(call, torch.randn(5, 20), parameters=list(layer.parameters()))
    assert fused() == ["linear", "activation_dropout"]


def test_dropout_behind_a_product_that_wins(products_win, torchs_draws):  # noqa: F811
    layer = nn.Linear(20, 16)
    assert_same(lambda x: F.dropout(layer(x), 0.4), torch.randn(5, 20))
    assert fused() == ["linear"]


def test_what_dropout_draws():
    layer, x = nn.Linear(64, 128), torch.randn(64, 64, requires_grad=True)
    call = torch.compile(lambda x: F.dropout(F.gelu(layer(x)), 0.25), backend="fastattn")
    torch.manual_seed(2)
    out = call(x)
    whole = F.gelu(layer(x)) / 0.75
    kept = out != 0
    assert 0.72 < kept.float().mean() < 0.78
    torch.testing.assert_close(out[kept], whole[kept], rtol=1e-4, atol=1e-5)
    mine = torch.autograd.grad(out.sum(), x)[0]
    torch.testing.assert_close(mine, torch.autograd.grad((whole * kept).sum(), x)[0])
    torch.manual_seed(2)
    assert torch.equal(call(x), out)
    assert not torch.equal(call(x), out)


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_by_itself(p, torchs_draws):  # noqa: F811
    assert_same(lambda x: F.dropout(x.sin(), p).cos(), torch.randn(5, 20))
    assert fused() == (["activation_dropout"] if p < 1.0 else [])


def test_dropout_that_is_left_to_torch(monkeypatch):
    x = torch.randn(4, 6)
    call = torch.compile(lambda x: F.dropout(x.sin(), 0.4, inplace=True), backend="fastattn")
    torch.manual_seed(1)
    out = call(x)
    torch.manual_seed(1)
    assert torch.equal(out, F.dropout(x.sin(), 0.4))
    assert "it is in place" in unsupported()
    monkeypatch.setattr(_served, "LEAST_DROPOUT", 30)
    call = torch.compile(lambda x: F.dropout(x.cos(), 0.4), backend="fastattn")
    torch.manual_seed(1)
    out = call(x)
    torch.manual_seed(1)
    assert torch.equal(out, F.dropout(x.cos(), 0.4))
    assert "24 elements: below 30 torch's own is faster" in unsupported()


def test_dropout_keeps_the_order_of_memory():
    x = torch.randn(3, 4, 5)
    call = torch.compile(
        lambda x: F.dropout(x.sin().transpose(0, 1), 0.5).transpose(0, 1).view(12, 5),
        backend="fastattn",
    )
    assert call(x).shape == (12, 5)


def test_an_activation_by_itself(kernel_calls):  # noqa: F811
    bias, weight = torch.randn(16), torch.randn(20, 16)
    assert_same(lambda x: new_gelu(torch.addmm(bias, x, weight)), torch.randn(5, 20))
    assert fused() == kernel_calls == ["activation_dropout"]


# --- gated ----------------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(20, 16), nn.Linear(20, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)


GATED = {
    "the gate first": lambda m, x: F.silu(m.gate(x)) * m.up(x),
    "the gate last": lambda m, x: m.up(x) * F.gelu(m.gate(x), approximate="tanh"),
    "written": lambda m, x: torch.mul((z := m.gate(x)) * torch.sigmoid(z), m.up(x)),
}


@pytest.mark.parametrize("case", GATED)
def test_gated(case, kernel_calls):  # noqa: F811
    model = Gated()
    assert_same(
        lambda x: GATED[case](model, x), torch.randn(5, 20), parameters=list(model.parameters())
    )
    assert fused() == kernel_calls == ["gated_mlp"]


def _input_changed_between(m, x):
    with torch.no_grad():
        x = x * 1.0
        gate = F.silu(m.gate(x))
        x.add_(1.0)
        return gate * m.up(x)


def _product_read(m, x):
    up = m.up(x)
    return F.silu(m.gate(x)) * up + up


def _another_input(m, x):
    return F.silu(m.gate(x)) * m.up(x + 1)


@pytest.mark.parametrize("call", [_input_changed_between, _product_read, _another_input])
def test_what_is_not_gated(call, kernel_calls):  # noqa: F811
    model = Gated()
    assert_same(lambda x: call(model, x), torch.randn(5, 20))
    assert fused() == ["linear"]
    assert "gated_mlp" not in kernel_calls


# --- several on one input -------------------------------------------------------------------------


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(20, 16), nn.Linear(20, 8)
        self.v = nn.Linear(20, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        q = self.q(x).view(-1, 4, 4).transpose(0, 1)
        k = self.k(x).view(-1, 2, 4).transpose(0, 1)
        return (q * k.repeat(2, 1, 1)).sum() + self.v(x).square().sum()


def test_layers_on_one_input(products_win, kernel_calls):  # noqa: F811
    model = Projections()
    assert_same(model, torch.randn(5, 20), parameters=list(model.parameters()))
    assert fused() == kernel_calls == ["multi_linear"]


def _kept_apart(m, x):
    x = x.sin()
    q = m.q(x)
    x.mul_(2.0)
    return q.sum() + m.k(x).sum()


def _weight_changed(m, x):
    with torch.no_grad():
        x = x.sin()
        q = m.q(x)
        m.k.weight.mul_(1.5)
        return q.sum() + m.k(x).sum()


def _weight_from_the_first(m, x):
    x = x.sin()
    q = m.q(x)
    return q.sum() + F.linear(x, q[:, :16].sum() * m.k.weight).sum()


def _on_the_argument(m, x):
    return m.q(x).sum() + m.k(x).sum()


@pytest.mark.parametrize(
    "call", [_kept_apart, _weight_changed, _weight_from_the_first, _on_the_argument]
)
def test_layers_that_stay_apart(call, products_win, kernel_calls):  # noqa: F811
    model = Projections()
    stock = Projections()
    stock.load_state_dict(model.state_dict())
    x = torch.randn(5, 20)
    actual = torch.compile(lambda x: call(model, x), backend="fastattn")(x)
    torch.testing.assert_close(actual, call(stock, x), rtol=1e-4, atol=1e-4)
    assert "multi_linear" not in fused()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_calls_the_ops_and_reads_the_weights_of_the_moment(
    mode,
    products_win,
    kernel_calls,  # noqa: F811
):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = Projections(), nn.Linear(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.gelu(self.inner.q(x.cos()))[:, :1]) + self.inner(x)

    model, x = Model(), torch.randn(5, 20)
    call = torch.compile(model, backend="fastattn")
    for _ in range(2):
        with mode():
            torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)
        assert not kernel_calls  # the user's functions were not needed
        with torch.no_grad():
            for p in model.parameters():
                p.data.add_(0.1)
    assert sorted(fused()) == ["linear", "linear", "multi_linear"]
    x.requires_grad_()
    actual, expected = (torch.autograd.grad(m(x).sum(), x)[0] for m in (call, model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(kernel_calls) == 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(call(x), model(x), rtol=0.05, atol=1.0)


def test_a_watched_call_at_inference_shows_torchs_operations(products_win):
    from torch.utils.flop_counter import FlopCounterMode

    model, x = nn.Sequential(nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(5, 20)
    call = torch.compile(model, backend="fastattn")
    with torch.no_grad():
        call(x)
        with FlopCounterMode(display=False) as counter:
            call(x)
    assert counter.get_total_flops() == 2 * 5 * (20 * 16 + 16 * 4)


# --- weights [in_features, out_features] ----------------------------------------------------------

ADDMM = {
    "alone": lambda x, w, b: torch.addmm(b, x, w),
    "Conv1D and NewGELU": lambda x, w, b: F.dropout(
        new_gelu(torch.addmm(b, x.view(-1, 20), w).view(4, 5, 16)), 0.4
    ),
    "Conv1D and dropout": lambda x, w, b: F.dropout(
        torch.addmm(b, x.view(-1, 20), w).view(4, 5, 16), 0.4
    ),
    "read before the view": lambda x, w, b: (y := torch.addmm(b, x, w)).view(4, 5, 16).sum() + y,
}


@pytest.mark.parametrize("case", ADDMM)
def test_addmm(case, products_win, kernel_calls, torchs_draws, monkeypatch):  # noqa: F811
    monkeypatch.setattr(_served, "LEAST_ROWS", 10)
    inputs = torch.randn(20, 20), torch.randn(20, 16), torch.randn(16)
    assert_same(ADDMM[case], *inputs)
    assert fused() == ["linear"]
    torch.compiler.reset()
    kernel_calls.clear()
    few = torch.randn(4, 20), *inputs[1:]
    assert_same(ADDMM["alone"], *few)
    assert not kernel_calls
    assert "torch's own product" in unsupported()


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: torch.addmm(b, x, w, beta=0.5),
        lambda x, w, b: torch.addmm(b.expand(20, 16), x, w),
        lambda x, w, b: torch.addmm(b[:1], x, w),
    ],
)
def test_addmm_that_is_no_layer(call, products_win):
    assert_same(call, torch.randn(20, 20), torch.randn(20, 16), torch.randn(16))
    assert not fused()
