"""What patch makes of blocks beside those of test_blocks: chains with functions and dropouts, T5's
dtypes, Conv1D."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from block_calls import assert_same, gradients, spied
from function_log import FunctionLog
from side_by_side import small_or_not  # noqa: F401 (a fixture)
from torch import Tensor, fx, nn

import fastattn
from fastattn import _products, reference
from fastattn.functional import _served

pytestmark = pytest.mark.native
WIDTH, HIDDEN = 16, 24


class Modules(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.act, self.dropout = nn.ReLU(), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.act(self.fc1(x))))


class Functional(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.three = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        x = F.relu(self.two(x))
        return self.three(x)


class Chunked(nn.Module):
    """DistilBERT's way: the forward hands chunks to another method."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.act, self.drop = nn.ReLU(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.ff_chunk(part) for part in x.split(2, 1)], 1)

    def ff_chunk(self, input: Tensor) -> Tensor:
        x = self.lin1(input)
        x = self.act(x)
        x = self.lin2(x)
        x = self.drop(x)
        return x


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    return spied(monkeypatch)


@pytest.mark.parametrize("make", [Functional, Digits, Chunked])
def test_chains(make, x, calls):
    model = assert_same(make().double(), x)
    assert calls.count("linear") == {Functional: 1, Digits: 2, Chunked: 3}[make]
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is type(model)
        assert torch.equal(twin(x), model(x))
    assert {e.reason for e in fastattn.patch(model).skipped} == {"already patched"}
    fastattn.unpatch(model)
    assert type(model) is make


def test_dropout_behind_the_activation(x):
    stock = Functional(0.3).double()
    model = copy.deepcopy(stock)
    fastattn.patch(model)
    torch.manual_seed(3)
    out = gradients(model, x)
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    factor = reference.keep_factor(x.new_empty(2, 5, HIDDEN), seed, 0.3)
    stock.dropout.forward = lambda z: z * factor
    torch.testing.assert_close(out, gradients(stock, x), rtol=1e-9, atol=1e-11)
    assert not torch.equal(factor, torch.ones_like(factor))


def test_torchs_draws(x):
    assert_same(Functional(0.3).double(), x)


EDITS = {
    "a hook on the dropout": lambda m: m.dropout.register_forward_hook(lambda a, b, out: 2 * out),
    "a hook on the Linear": lambda m: m.fc1.register_forward_hook(lambda a, b, out: 2 * out),
    "another dropout": lambda m: setattr(m, "dropout", nn.Tanh()),
    "an adapter": lambda m: setattr(m, "fc1", nn.Sequential(m.fc1)),
    "a child in the way": lambda m: vars(m).update(dropout=torch.tanh),
    "no child at all": lambda m: delattr(m, "dropout"),
    "another width": lambda m: setattr(m, "fc1", nn.Linear(WIDTH, 3).double()),
}


@pytest.mark.usefixtures("small_or_not")
@pytest.mark.parametrize("make", [Functional, Modules])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_after_patch(edit, make, x):
    stock = make().double()
    model = copy.deepcopy(stock)
    fastattn.patch(model)
    outcomes = []
    for m in (model, stock):
        torch.manual_seed(0)
        edit(m)
        try:
            outcomes.append(m(x))
        except (RuntimeError, AttributeError) as error:
            outcomes.append(str(error))
    if isinstance(outcomes[1], str):
        assert outcomes[0] == outcomes[1]
    else:
        torch.testing.assert_close(*outcomes, rtol=1e-9, atol=1e-11)


def test_a_function_that_is_replaced_later(x, monkeypatch):
    model = Functional().double()
    fastattn.patch(model)
    monkeypatch.setattr(F, "gelu", torch.tanh)
    expected = model.fc2(torch.tanh(F.linear(x, model.fc1.weight, model.fc1.bias)))
    torch.testing.assert_close(model(x), expected)


def test_a_name_that_is_missing_later(x, monkeypatch):
    model = Functional().double()
    fastattn.patch(model)
    monkeypatch.delitem(Functional.forward.__globals__, "F")
    with pytest.raises(NameError, match="name 'F' is not defined"):
        model(x)
    monkeypatch.undo()
    del model.fc1
    with pytest.raises(AttributeError, match="no attribute 'fc1'"):
        model(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("small_or_not")
@pytest.mark.parametrize("make", [Functional, Modules])
def test_tools(make, x):
    stock = make().double()
    model = copy.deepcopy(stock)
    fastattn.patch(model)
    expected = stock(x)
    assert [str(n) for n in fx.symbolic_trace(model).graph.nodes] == [
        str(n) for n in fx.symbolic_trace(stock).graph.nodes
    ]
    seen = []
    for m in (model, stock):
        with FunctionLog() as log:
            m(x)
        seen.append(log.seen)
    assert seen[0] == seen[1]
    traced = torch.jit.trace(model, x.detach())
    assert "fastattn" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled, x), gradients(stock, x))
    torch.testing.assert_close(torch.export.export(model, (x.detach(),)).module()(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


@pytest.mark.usefixtures("small_or_not")
def test_calls_of_a_chain(x):
    stock = Modules().double()
    model = copy.deepcopy(stock)
    fastattn.patch(model)
    assert torch.allclose(model(x=x), stock(x))
    for call in (lambda m: m(x, x), lambda m: m(), lambda m: m(None), lambda m: m(x, y=x)):
        errors = []
        for m in (model, stock):
            with pytest.raises(TypeError) as error:
                call(m)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


def test_small_inputs_run_torchs_code(x, calls, monkeypatch):
    monkeypatch.setattr(_served, "LEAST_WORK", 10 * WIDTH * HIDDEN)
    model = Functional().double()
    fastattn.patch(model)
    model(x[:, :4])
    assert not calls
    model(x)
    assert calls == ["linear"]


# --- T5 -------------------------------------------------------------------------------------------


def t5(name: str, **config: object) -> nn.Module:
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    sizes = {"d_model": WIDTH, "d_ff": HIDDEN, "dropout_rate": 0.0, "dense_act_fn": "gelu_new"}
    return getattr(modeling, name)(SimpleNamespace(**{**sizes, **config}))


@pytest.mark.parametrize("name", ["T5DenseActDense", "T5DenseGatedActDense"])
def test_t5(name, x, calls):
    assert_same(t5(name).double(), x)
    assert calls == ["gated_mlp" if "Gated" in name else "linear"]


@pytest.mark.parametrize("name", ["T5DenseActDense", "T5DenseGatedActDense"])
@pytest.mark.parametrize("edit", ["a wider last layer", "autocast", "a dropout of another kind"])
def test_t5_in_several_dtypes(name, edit, calls):
    stock = t5(name)
    if edit == "a dropout of another kind":
        stock.dropout = nn.Tanh()
    model = copy.deepcopy(stock)
    fastattn.patch(model)
    inputs = torch.randn(2, 5, WIDTH)
    results = []
    for m in (model, stock):
        if edit == "a wider last layer":
            m.bfloat16().wo.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=edit == "autocast"):
            results.append(m(inputs.to(next(m.parameters()).dtype)))
    assert results[0].dtype == results[1].dtype
    torch.testing.assert_close(*results)
    assert not calls


# --- Conv1D ---------------------------------------------------------------------------------------


@pytest.fixture
def conv1d(monkeypatch):
    """Its class, with the kernels where they would not be faster too."""
    monkeypatch.setattr(_served, "LEAST_ROWS", 0)
    monkeypatch.setattr(_products, "why_torchs", lambda *a: None)
    monkeypatch.setattr(_products, "why_swap", lambda *a: "it is wanted here")
    return pytest.importorskip("transformers.pytorch_utils").Conv1D


def test_conv1d(conv1d, calls):
    stock = conv1d(HIDDEN, WIDTH)
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    nn.init.normal_(stock.bias)
    model = assert_same(stock, x, rtol=1e-5, atol=1e-5)
    assert calls == ["mlp"]
    model(x).sum().backward()
    assert model.weight.grad.is_contiguous()
    assert repr(model) == repr(stock)


def test_conv1d_calls(conv1d):
    stock = conv1d(HIDDEN, WIDTH)
    model = copy.deepcopy(stock)
    fastattn.patch(model)
    for given in (
        torch.randn(5, 2, WIDTH).transpose(0, 1),  # torch's view refuses it
        torch.randn(2, WIDTH + 1),
        torch.randn(2, WIDTH).double(),
        torch.randn(WIDTH),
        torch.randn(0, WIDTH),
        torch.randn(2, WIDTH, device="meta"),
    ):
        outcomes = []
        for m in (model, stock):
            try:
                outcomes.append(m(given))
            except RuntimeError as error:
                outcomes.append(str(error))
        if isinstance(outcomes[1], str) or given.is_meta:
            assert str(outcomes[0]) == str(outcomes[1])
        else:
            torch.testing.assert_close(*outcomes)


def test_the_mlp_of_gpt2(conv1d, calls):
    modeling = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    config = SimpleNamespace(hidden_size=WIDTH, activation_function="gelu_new", resid_pdrop=0.3)
    stock = modeling.GPT2MLP(HIDDEN, config)
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    assert_same(stock, x, rtol=1e-5, atol=1e-5)
    assert calls == ["linear", "mlp"]
