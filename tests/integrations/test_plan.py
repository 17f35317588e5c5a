"""The plan of a patch, what it leaves alone and why, and the report."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from small_models import Encoder, digits, models, reason
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastattn
from fastattn import nn as fnn
from fastattn.integrations.swaps import ClassSwap

pytestmark = pytest.mark.native

# --- plan, then apply -----------------------------------------------------------------------------


@models
def test_a_plan_changes_nothing(make, counts):
    model = make()
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    plan = fastattn.plan(model)
    dry = fastattn.patch(model, dry_run=True)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before
    assert str(plan) == str(dry)
    assert str(dry).startswith("fastattn (dry run): 1 ")
    assert dry.counts == counts
    applied = plan.apply()
    assert applied.entries == dry.entries
    assert str(applied).startswith("fastattn: 1 ")


def test_a_plan_that_is_out_of_date_is_refused_whole():
    model = nn.Sequential(digits(), digits())
    plan = fastattn.plan(model)
    model[1].__class__ = type("Block", (nn.Sequential,), {})
    with pytest.raises(RuntimeError, match="1: expected a Sequential, as planned, got Block"):
        plan.apply()
    assert type(model[0]) is nn.Sequential
    assert not fastattn.unpatch(model).entries


def test_an_exception_leaves_the_model_as_it_was(monkeypatch):
    model = Encoder()
    classes, attributes = zip(*((type(m), set(vars(m))) for m in model.modules()), strict=True)
    swap, done = ClassSwap.do, []

    def fails_at_the_third(self: ClassSwap) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(self)
        swap(self)

    monkeypatch.setattr(ClassSwap, "do", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        fastattn.patch(model)
    assert len(done) == 2
    assert [type(m) for m in model.modules()] == list(classes)
    assert [set(vars(m)) for m in model.modules()] == list(attributes)


def test_on_the_meta_device():
    """A class swap needs no data; what is on the meta device is served once it is not."""
    with torch.device("meta"):
        model = nn.Sequential(digits(), nn.TransformerEncoderLayer(10, 2, batch_first=True))
    assert len(fastattn.patch(model, dropout=False).swapped) == 3
    assert model(torch.empty(3, 5, 8, 8, device="meta").flatten(2)[:, 0]).shape == (3, 10)


# --- what is left alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "model", torch.zeros(3), nn.Linear])
def test_not_a_module(model):
    for function in (fastattn.patch, fastattn.unpatch):
        with pytest.raises(TypeError, match="model: expected an nn.Module, got"):
            function(model)


def test_nothing_to_swap():
    for model in (nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4), nn.GELU()), nn.Conv2d(1, 1, 1)):
        first, *notes = str(fastattn.patch(model)).splitlines()
        assert first == "fastattn: nothing to swap"
        assert len(notes) == (not isinstance(model, nn.Conv2d))


def test_own_modules_are_left_alone():
    model = nn.ModuleList([fnn.MLP(4, 4, 4), fnn.LinearReLU(4, 4), fnn.MultiheadAttention(4, 2)])
    classes = [type(m) for m in model.modules()]
    assert not fastattn.patch(model).swapped
    assert not fastattn.unpatch(model).entries
    assert [type(m) for m in model.modules()] == classes


def hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda m, args, out: None)
    return linear


class MyLinear(nn.Linear):
    pass


REFUSED = {
    "hooks": (lambda: hooked(nn.Linear(64, 64)), "it has hooks"),
    "subclass": (lambda: MyLinear(64, 64), "subclass of Linear"),
    "lazy": (lambda: nn.LazyLinear(64), "lazy"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(64, 64)), "parametrized"),
    "dtype": (lambda: nn.Linear(64, 64, dtype=torch.complex64), "no kernel serves torch.complex64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_linear_that_must_stay(case):
    make, expected = REFUSED[case]
    linear = make()
    kind = type(linear)
    report = fastattn.patch(nn.Sequential(linear, nn.ReLU()))
    assert expected in reason(report, "0")
    assert not report.swapped
    assert type(linear) is kind
    assert expected in str(report)


def test_a_scripted_model_is_left_alone():
    scripted = torch.jit.script(digits())
    report = fastattn.patch(nn.Sequential(digits(), scripted))
    assert [e.name for e in report.swapped] == ["0"]
    assert "it is scripted: patch the model, then script it" in reason(report, "1")
    assert "it is scripted" in reason(fastattn.patch(scripted), "(root)")


def test_subclasses_of_attention_layers_stay():
    class Mine(nn.MultiheadAttention):
        pass

    class Layer(nn.TransformerEncoderLayer):
        pass

    layer = Layer(8, 2)
    layer.self_attn = Mine(8, 2)
    report = fastattn.patch(nn.ModuleList([layer]), dropout=False)
    assert "subclass of TransformerEncoderLayer" in reason(report, "0")
    assert "subclass of MultiheadAttention" in reason(report, "0.self_attn")
    assert not report.swapped


def test_a_shared_linear_keeps_its_own_meaning():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.net = nn.Sequential(self.fc, nn.ReLU(), nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.fc(x)) + torch.relu(self.net[2](x))

    model = Tied().double()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    report = fastattn.patch(model)
    assert {e.after for e in report.swapped} == {"fastattn FusedSequential"}
    assert type(model.fc) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_the_code_of_a_model_is_not_run():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("patch ran the model")

    model = nn.Sequential(Noisy(), digits())
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    assert fastattn.patch(model).swapped
    assert torch.equal(torch.rand(4), expected)


def test_the_children_of_a_sequential_keep_their_meaning():
    model = digits().double()
    x = torch.randn(3, 64, dtype=torch.float64)
    expected, hidden = model(x), model[:2](x)
    fastattn.patch(model)
    assert hidden.min() < 0
    torch.testing.assert_close(model[:2](x), hidden)
    torch.testing.assert_close(nn.Sequential(*list(model.children())[:2])(x), hidden)
    seen = []
    handle = model[1].register_forward_hook(lambda m, args, out: seen.append(out))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(seen[0], hidden)
    handle.remove()
    parametrizations.weight_norm(model[1])
    torch.testing.assert_close(model(x), expected)
    assert parametrize.is_parametrized(model[1])
    model[2] = nn.Tanh()
    torch.testing.assert_close(model(x), model[3](hidden.tanh()))


def test_a_sequential_subclass_stays():
    class Block(nn.Sequential):
        pass

    report = fastattn.patch(Block(nn.Linear(6, 6), nn.ReLU()))
    assert "subclass of Sequential" in reason(report, "0")


def test_unpatch_does_not_undo_others_changes():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    fastattn.patch(model)
    parametrizations.weight_norm(model[0], "in_proj_weight")
    report = fastattn.unpatch(model)
    assert "changed after patch" in reason(report, "0")
    parametrize.remove_parametrizations(model[0], "in_proj_weight")
    fastattn.unpatch(model)
    assert type(model[0]) is nn.MultiheadAttention


def test_unpatch_of_what_was_never_patched():
    report = fastattn.unpatch(digits())
    assert str(report) == "fastattn: nothing to undo: the model is not patched"


def test_no_native_library(monkeypatch):
    monkeypatch.setattr(fastattn.backends, "unsupported", lambda p, b: ["it is not there"])
    report = fastattn.patch(nn.Sequential(*digits(), nn.MultiheadAttention(8, 2)))
    assert not report.swapped
    assert len(report.skipped) == 2
    assert all("cpu: it is not there" in e.reason for e in report.skipped)


# --- the report -----------------------------------------------------------------------------------


def test_report():
    model = nn.Sequential(hooked(nn.Linear(6, 6)), nn.ReLU(), nn.MultiheadAttention(6, 2))
    report = fastattn.patch(model)
    lines = str(report).splitlines()
    assert lines[0] == "fastattn: 1 MultiheadAttention -> fastattn MultiheadAttention; 1 left alone"
    assert lines[1].startswith("  2: MultiheadAttention -> fastattn MultiheadAttention: ")
    assert lines[2].startswith("  0: Linear left alone: it has hooks")
    assert len(report.swapped) == len(report.skipped) == 1
    console = Console(file=io.StringIO(), width=120)
    console.print(report)
    shown = console.file.getvalue()
    assert "(left alone)" in shown
    assert "MultiheadAttention" in shown


@pytest.mark.parametrize("count", [3, 4, 30])
def test_layers_that_are_alike_are_one_line_of_the_report(count):
    model = nn.Sequential(*(nn.MultiheadAttention(6, 2) for _ in range(count)))
    report = fastattn.patch(model)
    assert len(report.swapped) == count
    lines = [line for line in str(report).splitlines() if "->" in line and line[0] == " "]
    assert len(lines) == (3 if count == 3 else 1)
    assert lines[0].startswith("  0: " if count == 3 else f"  0 (and {count - 1} more): ")


def test_a_compiled_model_is_patched_inside():
    model = torch.compile(digits(), backend="eager", fullgraph=True)
    x = torch.randn(3, 64)
    expected = model(x)
    assert fastattn.patch(model).swapped
    torch.testing.assert_close(model(x), expected)
