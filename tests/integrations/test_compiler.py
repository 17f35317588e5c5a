"""torch.compile(backend="fastattn"): what is fused, what is not, and that results stay."""

from __future__ import annotations

import copy

import compiled
import pytest
import torch
import torch.nn.functional as F
from compiled import (  # noqa: F401
    Net,
    assert_same,
    fused,
    kernel_calls,
    no_graph_of_another_test,
    unsupported,
)
from torch import Tensor, nn

import fastattn
from fastattn.functional import _served
from fastattn.integrations import graph

pytestmark = compiled.MARKS


@pytest.mark.parametrize(
    "relu",
    [torch.relu, F.relu, Tensor.relu, torch.relu_, Tensor.relu_, nn.ReLU(), nn.ReLU(inplace=True),
     lambda x: F.relu(x, inplace=True), lambda x: F.dropout(torch.relu(x), 0.5, training=False),
     lambda x: F.dropout(torch.relu(x), 0.0)],
    ids=["torch.relu", "F.relu", "method", "torch.relu_", "method_", "module", "inplace",
         "F.inplace", "dropout off", "dropout of 0"],
)  # fmt: skip
def test_a_network_with_a_forward_of_its_own_is_one_call(relu, kernel_calls):  # noqa: F811
    if relu in (Tensor.relu, Tensor.relu_) and torch.__version__.startswith("2.11."):
        pytest.skip("Dynamo of torch 2.11 breaks the graph at a method that a module holds")
    net = Net(relu)
    assert_same(net, torch.randn(5, 20), parameters=list(net.parameters()))
    assert fused() == kernel_calls == ["mlp"]
    assert not fastattn.compile_report().skipped


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_training_gives_the_same_losses(optimizer):
    stock = Net()
    ours = copy.deepcopy(stock)
    losses = []
    for net, call in ((stock, stock), (ours, torch.compile(ours, backend="fastattn"))):
        torch.manual_seed(0)
        steps = optimizer(net.parameters(), lr=0.01)
        for _ in range(5):
            x, y = torch.randn(8, 20), torch.randint(10, (8,))
            loss = F.cross_entropy(call(x), y)
            losses.append(loss.item())
            steps.zero_grad()
            loss.backward()
            steps.step()
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-5)
    assert losses[0] != losses[1]
    assert fused() == ["mlp"]


def _taken_twice(net, x):
    hidden = net.fc1(x)
    return net.fc2(torch.relu(hidden)) + hidden.sum()


def _changed_in_place(net, x):
    hidden = net.fc1(x)
    hidden.add_(1.0)
    return net.fc2(torch.relu(hidden))


def _activated_in_place(net, x):
    hidden = net.fc1(x)
    torch.relu_(hidden)
    return net.fc2(hidden)


def _kept(net, x):
    net.hidden = net.fc1(x)
    return torch.relu(net.hidden)


def _viewed(net, x):
    hidden = net.fc1(x)
    view = hidden[0]
    return torch.relu(hidden) + view


def _relu_without_gradient(net, x):
    hidden = net.fc1(x)
    with torch.no_grad():
        return torch.relu(hidden)


def _relu_in_another_dtype(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        hidden = net.fc1(x)
    return torch.relu(hidden)


def _weight_changed_between(net, x):
    with torch.no_grad():
        hidden = torch.relu(net.fc1(x))
        net.fc2.weight.mul_(1.0)
        return net.fc2(hidden)


def _as_a_weight(net, x):
    return F.linear(x[:, :16], torch.relu(net.fc1(x)))


@pytest.mark.parametrize(
    ("call", "expected", "reason"),
    [
        (_taken_twice, [], "sum reads it as well as the ReLU"),
        (_changed_in_place, [], "no activation with a kernel after it"),
        (_activated_in_place, [], "linear reads it as well as the ReLU"),
        (_kept, [], "the caller reads it as well as the ReLU"),
        (_viewed, [], "getitem reads it as well as the ReLU"),
        (_relu_without_gradient, [], "the mode (grad, autocast) may change"),
        (_relu_in_another_dtype, [], "the mode (grad, autocast) may change"),
        (_weight_changed_between, ["linear_relu"], "no activation with a kernel after it"),
        (_as_a_weight, ["linear_relu"], "no activation with a kernel after it"),
        (lambda net, x: net.fc2(torch.tanh(net.fc1(x))), [], "no activation with a kernel"),
        (lambda net, x: net.fc1(x).clamp(min=0), [], "no activation with a kernel after it"),
        (lambda net, x: F.linear(x, net.fc1.weight[0]), [], "broadcast"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_somebody_else_may_see_is_not_fused(call, expected, reason, kernel_calls):  # noqa: F811
    net = Net()
    assert_same(lambda x: call(net, x), torch.randn(5, 20), parameters=list(net.parameters()))
    assert fused() == kernel_calls == expected
    assert reason in unsupported()


def test_what_the_report_says_of_the_layers():
    net = nn.ModuleDict({"a": Net(), "b": Net(torch.tanh)})
    torch.compile(lambda x: net["a"](x) + net["b"](x), backend="fastattn")(torch.randn(5, 20))
    report = fastattn.compile_report()
    assert [e.name for e in report.swapped] == ["net.a.fc1, net.a.fc2"]
    assert [e.name for e in report.skipped] == ["net.b.fc1 (and 1 more)"]
    assert report.summary() == (
        "fastattn: 1 graph; 1 linear, relu, ..., linear -> fastattn mlp; 1 left alone"
    )
    assert "net.b.fc1 (and 1 more): linear left alone: no activation with a kernel after it" in str(
        report
    )
    torch.compiler.reset()
    assert str(fastattn.compile_report()) == "fastattn: 0 graphs; nothing fused; 0 left alone"


def test_code_without_modules_is_named_by_its_line():
    w = torch.randn(4, 3)
    torch.compile(lambda x: F.linear(x, w).relu(), backend="fastattn")(torch.randn(2, 3))
    (entry,) = fastattn.compile_report().swapped
    assert entry.name.startswith("test_compiler.py:")


def _replaced(net):
    net.fc1 = nn.Linear(20, 16)


def _hooked(net):
    net.fc1.register_forward_hook(lambda m, args, out: 2 * out)


def _hooked_before(net):
    net.fc2.register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def _other_activation(net):
    net.relu = torch.tanh


def _other_forward(net):
    net.fc1.forward = lambda x: F.linear(x, net.fc1.weight) + 1


def _parametrized(net):
    nn.utils.parametrizations.weight_norm(net.fc1)


def _frozen(net):
    net.fc1.requires_grad_(False)


@pytest.mark.parametrize(
    "edit",
    [_replaced, _hooked, _hooked_before, _other_activation, _other_forward, _parametrized, _frozen],
)
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)  # else torch looks at no new hooks
def test_an_edit_after_compilation_is_seen(edit):
    stock, x = Net(), torch.randn(5, 20)
    ours = copy.deepcopy(stock)
    call = torch.compile(ours, backend="fastattn")
    torch.testing.assert_close(call(x), stock(x))
    for net in (stock, ours):
        torch.manual_seed(3)
        edit(net)
    actual, expected = call(x), stock(x)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    expected.sum().backward()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_all_lengths_have_two_graphs():
    net = Net()
    call = torch.compile(net, backend="fastattn")
    for rows in (5, 7, 11, 13, 1):
        x = torch.randn(rows, 20)
        torch.testing.assert_close(call(x), net(x))
    assert fastattn.compile_report().graphs <= 3  # a single row has one of its own


def test_small_problems_are_torchs(monkeypatch, kernel_calls):  # noqa: F811
    monkeypatch.setattr(_served, "LEAST_WORK", 5 * (20 * 16 + 16 * 10) + 1)
    net = Net()
    call = torch.compile(net, backend="fastattn")
    call(torch.randn(5, 20))
    assert not fused()
    assert "2,400 multiply-adds in all: below 2,401 torch's own code is faster" in unsupported()
    call(torch.randn(6, 20))
    call(torch.randn(4, 20))
    assert fused() == kernel_calls == ["mlp"]


def test_a_patched_model_is_compiled_too():
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10))
    stock = copy.deepcopy(model)
    assert fastattn.patch(model).swapped
    x = torch.randn(5, 20)
    torch.testing.assert_close(torch.compile(model, backend="fastattn")(x), stock(x))


def test_tensors_of_another_kind_are_left_to_torch():
    class Marked(Tensor):
        pass

    net, x = Net(), torch.randn(5, 20).as_subclass(Marked)
    actual, expected = torch.compile(net, backend="fastattn")(x), net(x)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected)


def test_a_watched_call_shows_torchs_operations():
    from torch.utils.flop_counter import FlopCounterMode

    net, x = Net(), torch.randn(5, 20)
    call = torch.compile(net, backend="fastattn")
    call(x)
    with FlopCounterMode(display=False) as counter:
        call(x)
    assert counter.get_total_flops() == 2 * 5 * (20 * 16 + 16 * 10)


@pytest.mark.parametrize("options", [{"mode": "max-autotune"}, {"options": {"x": 1}}])
def test_options_are_refused(options):
    call = torch.compile(Net(), backend="fastattn", **options)
    with pytest.raises(Exception, match="the backend fastattn has none, got"):
        call(torch.randn(5, 20))


def test_a_graph_that_cannot_be_rewritten_runs_as_it_is(monkeypatch):
    def broken(*_: object) -> None:
        raise KeyError("nobody thought of it")

    monkeypatch.setattr(graph, "_PUT", (broken,))
    net, x = Net(), torch.randn(5, 20)
    with pytest.warns(fastattn.FastAttnWarning, match="nobody thought of it"):
        actual = torch.compile(net, backend="fastattn")(x)
    torch.testing.assert_close(actual, net(x))


def test_the_backend_is_found_by_its_name():
    assert "fastattn" in torch._dynamo.list_backends()
