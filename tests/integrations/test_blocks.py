"""Blocks that patch knows by the code of their forward: which modules they are, what they compute,
copies, pickles, hooks, edits after patch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from block_calls import spied
from torch import Tensor, nn

import fastattn
from fastattn import reference
from fastattn.integrations import blocks

pytestmark = pytest.mark.native
WIDTH, HIDDEN = 16, 24


class Up(nn.Module):
    def __init__(self, activation: object = None) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, HIDDEN)
        self.act = activation or nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x)
        x = self.act(x)
        return x


class Down(nn.Module):
    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.projection = nn.Linear(HIDDEN, WIDTH)
        self.drop = nn.Dropout(p)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-3)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        hidden = self.projection(hidden)
        hidden = self.drop(hidden)
        hidden = self.norm(hidden + residual)
        return hidden


class Gated(nn.Module):
    def __init__(self, activation: object = F.silu) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN)
        self.down, self.act = nn.Linear(HIDDEN, WIDTH), activation

    def forward(self, x: Tensor) -> Tensor:
        result = self.down(self.act(self.gate(x)) * self.up(x))
        return result


class Block(nn.Module):
    """A feed-forward whose parts are known, in a forward that is not."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.up, self.down, self.gated = Up(), Down(p), Gated()

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(self.down(self.up(x), x))


def close(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def gradients(call, x: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    out = call(x)
    t = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return (out, *torch.autograd.grad(out, (x, *model.parameters()), t))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)


def test_patch_and_unpatch(x):
    stock = Block(p=0.0).double()
    model = copy.deepcopy(stock)
    report = fastattn.patch(model)
    assert {(e.name, e.before, e.after) for e in report.swapped} == {
        ("up", "Up", "fastattn Up"), ("down", "Down", "fastattn Down"),
        ("gated", "Gated", "fastattn Gated"),
    }  # fmt: skip
    assert all("as one kernel call" in e.reason for e in report.swapped)
    assert isinstance(model.up, Up)
    assert repr(model) == repr(stock)
    assert list(model.state_dict()) == list(stock.state_dict())
    close(gradients(model, x, model), gradients(stock, x, stock))
    assert "already patched" in str(fastattn.patch(model))
    fastattn.unpatch(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert torch.equal(model(x), stock(x))


def test_the_kernels_are_called(x, monkeypatch):
    seen = spied(monkeypatch)
    model = Block().double()
    fastattn.patch(model)
    model(x)
    assert seen == ["linear", "dropout_add_norm", "gated_mlp"]
    seen.clear()
    model.eval()(x)  # torch's sum and norm
    assert seen == ["linear", "gated_mlp"]


def test_dropout_in_training(x):
    model, stock = Down().double(), Down().double()
    stock.load_state_dict(model.state_dict())
    fastattn.patch(model)
    hidden = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    torch.manual_seed(3)
    out = gradients(lambda x: model(hidden, x), x, model)
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    factor = reference.keep_factor(x, seed, 0.3)

    def theirs(x: Tensor) -> Tensor:
        return stock.norm(stock.projection(hidden) * factor + x)

    close(out, gradients(theirs, x, stock))


OTHERS = {
    "returns a pair": ("x", "x = self.lin(x); x = self.act(x); return x, x"),
    "the input twice": ("x", "y = self.lin(x); y = self.act(x); return y"),
    "twice the same": ("x", "x = self.act(x); x = self.lin(x); x = self.act(x); return x"),
    "an option": ("x, option=None", "x = self.lin(x); x = self.act(x); return x"),
    "more arguments": ("x, *rest", "x = self.lin(x); x = self.act(x); return x"),
}  # fmt: skip


@pytest.mark.parametrize("source", OTHERS.values(), ids=OTHERS)
def test_other_code_is_left_alone(source):
    space: dict[str, object] = {}
    arguments, body = source
    exec(f"def forward(self, {arguments}): {body}", space)
    kind = type("Other", (Up,), {"forward": space["forward"]})
    assert blocks.block_class(kind) is None
    assert not fastattn.patch(kind()).swapped


@pytest.mark.parametrize(
    "make",
    [
        lambda: Up(nn.Tanh()),
        lambda: Up(lambda z: z),
        lambda: Gated(torch.sigmoid),
        lambda: _edited(Up(), "lin", nn.Sequential(nn.Linear(WIDTH, HIDDEN))),
        lambda: _edited(Up(), "lin", nn.Bilinear(2, 2, 2)),
        lambda: _edited(Down(), "norm", nn.RMSNorm(WIDTH)),
        lambda: _edited(Down(), "drop", nn.AlphaDropout()),
        lambda: _edited(Up(), "forward", lambda x: x),
    ],
)
def test_other_children_are_left_alone(make):
    assert not fastattn.patch(make(), dropout=False).swapped


def _edited(module: nn.Module, name: str, value: object) -> nn.Module:
    setattr(module, name, value)
    return module


EDITS = {
    "a hook on the Linear": lambda m: m.up.lin.register_forward_hook(lambda a, b, out: 2 * out),
    "a hook on the activation": lambda m: m.up.act.register_forward_hook(lambda a, b, out: 2 * out),
    "a hook on the norm": lambda m: m.down.norm.register_forward_hook(lambda a, b, out: 2 * out),
    "a hook on the gate": lambda m: m.gated.gate.register_forward_hook(lambda a, b, out: 2 * out),
    "a hook on the block": lambda m: m.up.register_forward_hook(lambda a, b, out: 2 * out),
    "another activation": lambda m: setattr(m.up, "act", nn.Tanh()),
    "another Linear": lambda m: setattr(m.up, "lin", nn.Linear(WIDTH, HIDDEN).double()),
    "an adapter": lambda m: setattr(m.up, "lin", nn.Sequential(m.up.lin)),
    "another norm": lambda m: setattr(m.down, "norm", nn.RMSNorm(WIDTH).double()),
    "all is dropped": lambda m: setattr(m.down.drop, "p", 1.0),
    "a gate of another width": lambda m: (
        setattr(m.gated, "gate", nn.Linear(WIDTH, 1).double()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_after_patch(edit, x):
    stock = Block(p=0.0).double()
    model = copy.deepcopy(stock)
    fastattn.patch(model)
    results = []
    for m in (model, stock):
        torch.manual_seed(0)
        edit(m)
        results.append(gradients(m, x, m))
    close(*results)


def test_copies_and_pickles(x):
    model = Block(p=0.0).double()
    expected = model(x)
    fastattn.patch(model)
    twins = [copy.copy(model.up), copy.deepcopy(model.up), pickle.loads(pickle.dumps(model.up))]
    assert {type(twin) for twin in twins} == {type(model.up)}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.up) is type(model.up)
        close(twin(x), expected)
        fastattn.unpatch(twin)
        assert type(twin.down) is Down
    assert type(model.down) is not Down


def test_arguments_by_name(x):
    stock = Down(0.0).double()
    model = copy.deepcopy(stock)
    fastattn.patch(model)
    model.drop.p = stock.drop.p = 1.0
    hidden = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    for call in (
        lambda m: m(hidden, residual=x),
        lambda m: m(residual=x, hidden=hidden),
        lambda m: m(hidden=hidden, residual=x),
    ):
        close(call(model), call(stock))
    for call in (
        lambda m: m(hidden),
        lambda m: m(hidden, x, x),
        lambda m: m(hidden, other=x),
        lambda m: m(hidden, hidden=hidden),
        lambda m: m(hidden, None),
    ):
        errors = []
        for m in (model, stock):
            with pytest.raises(TypeError) as error:
                call(m)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


def test_a_forward_that_is_replaced_later(x, monkeypatch):
    model = Block(p=0.0).double()
    fastattn.patch(model)
    monkeypatch.setattr(Up, "forward", lambda self, x: self.act(self.lin(x)) * 2)
    close(model.up(x), 2 * F.gelu(F.linear(x, model.up.lin.weight, model.up.lin.bias)))


def test_a_global_hook(x):
    model = Block(p=0.0).double()
    fastattn.patch(model)
    expected, called = model(x), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(type(m)))
    try:
        close(model(x), expected)
    finally:
        handle.remove()
    assert nn.GELU in called
    assert called.count(nn.Linear) == 5


def test_compiled(x):
    model = Block(p=0.0).double()
    expected = gradients(model, x, model)
    fastattn.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(gradients(compiled, x, model), expected)


def test_residuals_that_broadcast(x):
    stock = Down(0.5).double()
    model = copy.deepcopy(stock)
    fastattn.patch(model)
    hidden = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    results = []
    for m in (model, stock):
        torch.manual_seed(1)
        results.append(m(hidden, x[:1, :1]))
    close(*results)
    with pytest.raises(RuntimeError, match="must match"):
        model(hidden, x[:, :3])


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu",
                                  "relu", "relu2", "gelu_python", "tanh"])  # fmt: skip
def test_activations_of_transformers(name, x):
    activations = pytest.importorskip("transformers.activations")
    model = Up(activations.ACT2FN[name]).double()
    expected = model(x)
    swapped = fastattn.patch(model).swapped
    assert bool(swapped) == (name not in ("gelu_python", "tanh"))
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-11)


def test_the_families_of_transformers():
    transformers = pytest.importorskip("transformers")
    from tiny_models import TEXT, build

    for name, parts in (("BertModel", 3), ("RobertaModel", 3), ("ElectraModel", 3),
                        ("MPNetModel", 2), ("CamembertModel", 3)):  # fmt: skip
        model = build(name, TEXT, "eager")
        report = fastattn.patch(model, dropout=False)
        swapped = {e.after for e in report.swapped if "layer.0." in e.name}
        assert len([after for after in swapped if after.startswith("fastattn ")]) == parts, name
    sizes = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, intermediate_size=24)
    model = transformers.LlamaModel(config)
    assert "layers.0.mlp" in [e.name for e in fastattn.patch(model).swapped]
