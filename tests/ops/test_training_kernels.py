"""The step of training as one op, against torch's own step in float64 and its own dtype."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import ops
from fastattn.functional._autograd import kernel
from fastattn.testing import assert_accurate, assert_close, unit_roundoff

pytestmark = pytest.mark.native

WIDTHS = [((784, 128, 10), 64), ((33, 17, 5), 7), ((5, 3), 1), ((70, 65, 130, 9), 100)]
# With an eps as large as gradients are: a smaller one divides roundings of gradients by themselves.
RULES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}, ops.Rule(0.1)),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        ops.Rule(0.1, 0.01, 0.9, variant=True),
    ),
    "adam": (torch.optim.Adam, {"lr": 0.01, "eps": 0.01}, ops.Rule(0.01, 0.0, 0.9, 0.999, 0.01)),
    "amsgrad": (
        torch.optim.AdamW,
        {"lr": 0.01, "eps": 0.01, "amsgrad": True, "maximize": True, "betas": (0.3, 0.9)},
        ops.Rule(0.01, 0.01, 0.3, 0.9, 0.01, True, True, True),
    ),
    "rmsprop": (
        torch.optim.RMSprop,
        {"lr": 0.01, "eps": 0.01},
        ops.Rule(0.01, 0.0, 0.0, 0.99, 0.01),
    ),
    "centered": (
        torch.optim.RMSprop,
        {"lr": 0.01, "eps": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
        ops.Rule(0.01, 0.1, 0.9, 0.99, 0.01, True),
    ),
}
ORDER = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "momentum_buffer",
         "grad_avg")  # fmt: skip
NUMBER = {torch.optim.SGD: 0, torch.optim.Adam: 1, torch.optim.AdamW: 1, torch.optim.RMSprop: 2}


class Problem:
    """A network, its optimizer after one step of torch's, and a batch."""

    def __init__(self, rule: str, widths: tuple[int, ...], rows: int, dtype: torch.dtype):
        self.widths = widths
        layers: list[nn.Module] = []
        for number, (k, n) in enumerate(pairwise(widths)):
            layers += [nn.Linear(k, n, bias=number != 1, dtype=dtype), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])
        kind, options, self.rule = RULES[rule]
        self.optimizer = kind(self.model.parameters(), **options)
        self.number = NUMBER[kind]
        self.x = torch.randn(rows, widths[0], dtype=dtype)
        self.labels = torch.randint(widths[-1], (rows,))
        self.targets = torch.randn(rows, widths[-1], dtype=dtype)
        self.torchs("cross_entropy")

    def torchs(self, loss: str, **options) -> Tensor:
        self.optimizer.zero_grad()
        function = getattr(F, f"{loss}_loss" if loss == "mse" else loss)
        target = self.targets if loss == "mse" else self.labels
        value = function(self.model(self.x), target, **options)
        value.backward()
        self.optimizer.step()
        return value.detach()

    def arguments(self, loss: ops.LossOptions) -> list:
        parameters, states = [], []
        for layer in self.model[::2]:
            parameters.append(layer.weight)
            parameters.append(layer.weight.new_empty(0) if layer.bias is None else layer.bias)
        for p in parameters:
            kept = self.optimizer.state.get(p, {})
            states += [kept[name] for name in ORDER if name in kept]
        rules = torch.tensor([self.rule] * len(parameters), dtype=torch.float64)
        relus = [True] * (len(parameters) // 2 - 1) + [False]
        target = self.targets if loss.name == "mse" else self.labels
        return [self.x, target, parameters, states, rules, relus, self.number, loss]

    def ours(self, loss: ops.LossOptions) -> Tensor:
        return kernel(ops.training_step, *self.arguments(loss))

    def double(self) -> Problem:
        """The same in float64."""
        self.model.double()
        self.x, self.targets = self.x.double(), self.targets.double()
        for kept in self.optimizer.state.values():
            kept.update({k: t if k == "step" else t.double() for k, t in kept.items()})
        return self

    def tensors(self) -> list[Tensor]:
        states = [t for p in self.model.parameters() for t in self.optimizer.state[p].values()]
        return [p.detach() for p in self.model.parameters()] + states


def assert_same_step(problem: Problem, loss: str, mean: bool = True, **options) -> None:
    """In float64 as torch's; in float32 as near to float64's as torch's."""
    twin, oracle = copy.deepcopy(problem), copy.deepcopy(problem).double()
    size = 1.0 + float(oracle.model(oracle.x).detach().abs().max())  # of a logit
    reduction = "mean" if mean else "sum"
    expected = oracle.torchs(loss, reduction=reduction, **options)
    problem.torchs(loss, reduction=reduction, **options)
    found = twin.ours(ops.LossOptions(loss, mean, options.pop("weight", None), **options))
    if problem.x.dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    else:  # a logit, the largest one, the sum and its logarithm are rounded; products more often
        assert_close("loss", found, expected, 16 * unit_roundoff(torch.float32) * size)
    for ours, exact, torchs in zip(
        twin.tensors(), oracle.tensors(), problem.tensors(), strict=True
    ):
        if ours.dtype == torch.float64:
            atol = 1e-13 * float(exact.abs().max())
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=atol)
        else:
            assert_accurate(f"{tuple(ours.shape)}", ours, exact, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("widths, rows", WIDTHS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_one_step(rule, widths, rows, dtype):
    assert_same_step(Problem(rule, widths, rows, dtype), "cross_entropy")


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_cross_entropy(ignored, weighted, smoothing, mean):
    problem = Problem("nesterov", (33, 17, 5), 12, torch.float64)
    if ignored != "none":
        problem.labels[: 5 if ignored == "some" else None] = 3
    options: dict = {"label_smoothing": smoothing, "ignore_index": 3}
    if ignored == "none":
        problem.labels[problem.labels == 3] = 4
    if weighted:
        options["weight"] = torch.rand(5, dtype=torch.float64)
    if ignored == "all" and mean:
        options.pop("label_smoothing")
        found = problem.ours(ops.LossOptions("cross_entropy", ignore_index=3))
        assert found.isnan()
        assert all(t.isfinite().all() for t in problem.tensors())
        return
    assert_same_step(problem, "cross_entropy", mean, **options)


@pytest.mark.parametrize("mean", [True, False])
def test_squared_error(mean):
    assert_same_step(Problem("adam", (33, 17, 5), 12, torch.float64), "mse", mean)


def test_the_last_layer_may_have_a_relu_too():
    problem = Problem("sgd", (33, 17, 5), 12, torch.float64)
    twin = copy.deepcopy(problem)
    problem.model.append(nn.ReLU())
    problem.torchs("mse")
    arguments = twin.arguments(ops.LossOptions("mse"))
    arguments[5] = [True, True]
    kernel(ops.training_step, *arguments)
    for ours, torchs in zip(twin.tensors(), problem.tensors(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("where", ["x", "weight", "state"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(value, where):
    problem = Problem("centered", (9, 7, 5), 12, torch.float64)
    first = problem.model[0].weight
    state = problem.optimizer.state[first]["momentum_buffer"]
    {"x": problem.x, "weight": first.data, "state": state}[where][1, 2] = value
    twin = copy.deepcopy(problem)
    expected, found = problem.torchs("cross_entropy"), twin.ours(ops.LossOptions("cross_entropy"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)
    for ours, torchs in zip(twin.tensors(), problem.tensors(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_a_gradient_that_does_not_change():
    """The mean square less the squared mean is 0 then, and not below."""
    problem = Problem("centered", (1, 1), 1, torch.float32)
    problem.rule = ops.Rule(0.0, 0.0, 0.0, 0.5, 1e-8, True)  # without a buffer
    problem.x.fill_(0.7)
    problem.targets.fill_(-0.6)
    arguments = problem.arguments(ops.LossOptions("mse"))
    arguments[3] = [t for t in arguments[3] if t is not problem.optimizer.state]
    names = ("step", "square_avg", "grad_avg")
    arguments[3] = [
        problem.optimizer.state[p][n] for p in problem.model.parameters() for n in names
    ]
    for _ in range(100):
        kernel(ops.training_step, *arguments)
    assert all(p.isfinite().all() for p in problem.model.parameters())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_repetitions(threads):
    problem, before = Problem("adam", (784, 128, 10), 64, torch.float32), torch.get_num_threads()
    twins = [copy.deepcopy(problem) for _ in range(2)]
    torch.set_num_threads(threads)
    try:
        losses = [twin.ours(ops.LossOptions("cross_entropy")) for twin in twins]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*losses)
    for first, second in zip(twins[0].tensors(), twins[1].tensors(), strict=True):
        assert torch.equal(first, second)


def test_an_input_that_is_a_parameter():
    problem = Problem("sgd", (9, 7, 5), 7, torch.float64)
    twin = copy.deepcopy(problem)
    problem.x = problem.model[0].weight.detach().clone()
    twin.x = twin.model[0].weight.detach()
    problem.torchs("cross_entropy")
    twin.ours(ops.LossOptions("cross_entropy"))
    for ours, torchs in zip(twin.tensors(), problem.tensors(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-14)


REFUSED = {
    "a label that is no class": (1, lambda t: t.fill_(5), "targets: expected classes below 5, got"),
    "too few labels": (1, lambda t: t[:-1], "targets: expected shape"),
    "labels of another dtype": (1, lambda t: t.int(), "targets: expected Long"),
    "an input of another width": (0, lambda t: t[:, 1:], "parameters: expected shape"),
    "an input of another dtype": (0, lambda t: t.float(), "parameters: expected Float"),
    "a parameter too few": (2, lambda t: t[:-1], "parameters: expected 4 tensors, got 3"),
    "a parameter that is not contiguous": (
        2, lambda t: [t[0].detach().t().contiguous().t(), *t[1:]], "parameters: expected contig",
    ),
    "a parameter twice": (2, lambda t: [t[0], t[1], t[2], t[1][:5]], "without memory in common"),
    "a state too few": (3, lambda t: t[:-1], "states: expected more than 11 tensors, got 11"),
    "a state too many": (3, lambda t: [*t, t[-1].clone()], "states: expected 12 tensors, got 13"),
    "a step of two elements": (3, lambda t: [torch.ones(2), *t[1:]], "states: expected a step of"),
    "too few rules": (4, lambda t: t[1:], "rules: expected shape"),
    "no layers": (5, lambda t: [], "relus: expected at least 1 layer"),
    "an unknown optimizer": (6, lambda n: 3, "optimizer: expected a number below 3, got 3"),
    "smoothing above 1": (
        7, lambda o: o._replace(label_smoothing=1.5), "label_smoothing: expected a number in",
    ),
    "class weights of another size": (
        7, lambda o: o._replace(class_weights=torch.ones(4).double()), "class_weights: expected sh",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case):
    problem = Problem("adam", (9, 7, 5), 6, torch.float64)
    problem.model[2].bias = nn.Parameter(torch.randn(5, dtype=torch.float64))
    problem.optimizer = torch.optim.Adam(problem.model.parameters())
    problem.torchs("cross_entropy")
    before = [t.clone() for t in problem.tensors()]
    arguments = problem.arguments(ops.LossOptions("cross_entropy"))
    place, change, message = REFUSED[case]
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message.replace("[", r"\[")):
        kernel(ops.training_step, *arguments)
    assert all(map(torch.equal, problem.tensors(), before))
