"""Where the kernel may not stand in for torch's loop, that loop runs, with its results, and the
reason is told."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, lr_scheduler
from training_models import (
    HIDDEN,
    IN,
    OUT,
    ROWS,
    Functional,
    Pair,
    assert_torchs,
    halved,
    sequential,
)

from fastattn import _products
from fastattn.training import step
from fastattn.training._network import Network

pytestmark = pytest.mark.native

# --- what is changed between steps ----------------------------------------------------------------


def replace_child(pair: Pair) -> None:
    for model in (pair.model, pair.twin):
        model[2] = nn.Sigmoid()


def replace_weight(pair: Pair) -> None:
    for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.twins_optimizer)):
        model[1].weight = nn.Parameter(torch.ones(HIDDEN, IN).double())
        optimizer.add_param_group({"params": [model[1].weight]})


def both(change: Callable[[nn.Module, torch.optim.Optimizer], object]) -> Callable[[Pair], None]:
    def changed(pair: Pair) -> None:
        change(pair.model, pair.optimizer)
        change(pair.twin, pair.twins_optimizer)

    return changed


def double_output(module, args, out):
    return 2 * out


def double_grad(parameter) -> None:
    parameter.grad.mul_(2)


def with_step(optimizer: torch.optim.Optimizer) -> None:
    whole = optimizer.step
    optimizer.step = lambda *args: [whole(*args), whole(*args)]


def tensor_lr(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)


CHANGES = {
    "a child": (replace_child, "2 is Sigmoid"),
    "a weight": (replace_weight, "not exactly the model's"),
    "a hook": (both(lambda m, o: m[1].register_forward_hook(double_output)), "1 has hooks"),
    "a hook before": (
        both(lambda m, o: m.register_forward_pre_hook(lambda m, x: (2 * x[0],))), "model has hooks",
    ),
    "a backward hook": (
        both(lambda m, o: m[3].register_full_backward_hook(lambda m, i, o: (2 * i[0],))),
        "3 has hooks",
    ),
    "an own forward": (
        both(lambda m, o: setattr(m[2], "forward", torch.tanh)), "2 has hooks, or a forward",
    ),
    "a frozen weight": (both(lambda m, o: m[1].weight.requires_grad_(False)), "frozen"),
    "a hook of a parameter": (
        both(lambda m, o: m[1].weight.register_hook(lambda g: 2 * g)), "a parameter has hooks",
    ),
    "a hook behind accumulation": (
        both(lambda m, o: m[1].bias.register_post_accumulate_grad_hook(double_grad)),
        "a parameter has hooks",
    ),
    "a step hook": (
        both(lambda m, o: o.register_step_post_hook(halved)), "step has hooks",
    ),
    "a step hook before": (
        both(lambda m, o: o.register_step_pre_hook(halved)), "step has hooks",
    ),
    "another step": (both(lambda m, o: with_step(o)), "step was replaced"),
    "another zero_grad": (
        both(lambda m, o: setattr(o, "zero_grad", lambda **_: m.zero_grad())), "zero_grad was",
    ),
    "a parameter more": (
        both(lambda m, o: o.add_param_group({"params": [nn.Parameter(torch.ones(2))]})),
        "not exactly the model's",
    ),
    "a parameter less": (
        both(lambda m, o: o.param_groups[0]["params"].pop()), "not exactly the model's",
    ),
    "a learning rate that is a tensor": (both(tensor_lr), "a hyperparameter is no number"),
    "differentiable": (
        both(lambda m, o: o.param_groups[0].update(differentiable=True)), "differentiable",
    ),
    "a forward of the class": (
        lambda pair: setattr(nn.ReLU, "forward", lambda self, x: x.tanh()), "2 is ReLU",
    ),
    "functional.relu": (
        lambda pair: setattr(F, "relu", lambda x, inplace=False: x.tanh()), "2 is ReLU",
    ),
    "functional.cross_entropy": (
        lambda pair: setattr(F, "cross_entropy", lambda *x, **_: 2 * CROSS_ENTROPY(*x)), "the loss",
    ),
    "the loss's reduction": (
        lambda pair: setattr(pair.loss, "reduction", "none"), "reduction is 'none'",
    ),
    "a hook of the loss": (
        lambda pair: pair.loss.register_forward_hook(double_output), "or has hooks",
    ),
}  # fmt: skip
CROSS_ENTROPY = F.cross_entropy


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_steps(name, monkeypatch):
    change, reason = CHANGES[name]
    for home, attribute in ((nn.ReLU, "forward"), (F, "relu"), (F, "cross_entropy")):
        monkeypatch.setattr(home, attribute, getattr(home, attribute))  # is put back
    pair = Pair(sequential())
    pair.train()
    assert pair.step.reason is None
    change(pair)
    if name == "the loss's reduction":
        with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar"):
            pair.step(*pair.batch())
        assert reason in pair.step.reason
        return
    assert_torchs(pair, reason)


def test_a_hook_that_is_removed_again():
    pair = Pair(sequential())
    handles = [m[1].register_forward_hook(double_output) for m in (pair.model, pair.twin)]
    assert_torchs(pair, "1 has hooks")
    for handle in handles:
        handle.remove()
    pair.train(2)
    assert pair.step.reason is None


def test_a_chain_whose_names_change(monkeypatch):
    pair = Pair(Functional())
    pair.train()
    assert pair.step.reason is None
    namespace = types.SimpleNamespace(relu=torch.tanh)
    monkeypatch.setitem(Functional.forward.__globals__, "F", namespace)
    assert_torchs(pair, "the model (Functional): its forward has `F`")
    monkeypatch.undo()
    pair.train(3)  # a model of other code is read seldom
    assert pair.step.reason is None
    monkeypatch.setattr(Functional, "forward", lambda self, x: self.fc2(self.fc1(x)))
    assert_torchs(pair, "the model (Functional): ")


def test_a_model_of_other_code_is_read_seldom(monkeypatch):
    pair, read = Pair(sequential(nn.Sigmoid)), []
    monkeypatch.setattr(step, "Network", lambda model: read.append(1) or Network(model))
    pair.train(40)
    assert len(read) == 6  # at steps 1, 3, 6, 11, 20 and 37
    assert "2 is Sigmoid" in pair.step.reason


def test_data_that_is_set_anew():
    pair = Pair(sequential())
    pair.train()
    for model in (pair.model, pair.twin):
        model[1].weight.data = torch.ones(HIDDEN, IN).double()
    pair.train(2)
    assert pair.step.reason is None
    for model in (pair.model, pair.twin):
        model[1].weight.data = torch.ones(IN, HIDDEN).double().t()
    assert_torchs(pair, "a parameter is not contiguous")


def test_data_that_is_transposed_in_place():
    pair = Pair(nn.Sequential(nn.Linear(IN, IN)), loss=nn.MSELoss())
    x, targets = pair.batch()[0], torch.randn(ROWS, IN).double()
    for reason in (None, "a parameter is not contiguous"):
        torch.testing.assert_close(pair.step(x, targets), pair.torchs(x, targets))
        assert pair.step.reason == reason or reason in pair.step.reason
        for model in (pair.model, pair.twin):
            model[0].weight.data = model[0].weight.data.t()
    pair.compare(rtol=1e-10, atol=1e-12)


def test_data_of_a_state_that_is_set_anew():
    pair = Pair(sequential(), lambda p: SGD(p, lr=0.1, momentum=0.9))
    pair.train(2)
    for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.twins_optimizer)):
        buffer = optimizer.state[model[1].weight]["momentum_buffer"]
        buffer.data = torch.zeros(IN, HIDDEN).double().t()
    assert_torchs(pair, "the kernel refused: ")


def test_a_state_of_the_optimizers_that_is_set_anew():
    pair = Pair(sequential(), lambda p: SGD(p, lr=0.1, momentum=0.9))
    pair.train(2)
    assert pair.step.reason is None
    for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.twins_optimizer)):
        optimizer.state[model[1].weight]["momentum_buffer"] = torch.zeros(IN, HIDDEN).double().t()
    assert_torchs(pair, "an unusual momentum_buffer")
    for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.twins_optimizer)):
        buffer = torch.zeros(HIDDEN, IN).double()
        optimizer.state[model[1].weight]["momentum_buffer"] = buffer
        model[1].weight.data = buffer
    assert_torchs(pair, "share memory")


# --- inputs, labels, losses, optimizers -----------------------------------------------------------


class Tagged(Tensor):
    pass


def test_inputs_and_labels():
    pair = Pair(sequential())
    x, labels = pair.batch()
    probabilities = torch.rand(ROWS, OUT).double()
    for given, target, reason in (
        (x.as_subclass(Tagged), labels, "the input is no ordinary tensor"),
        (x.clone().requires_grad_(), labels, "requires a gradient"),
        (x, probabilities, "no class indices"),
        (x, labels.to(torch.uint8), "no class indices"),
        (x, probabilities.clone().requires_grad_(), "the labels require a gradient"),
        (x[:0], labels[:0], "not of shape"),
    ):
        ours, torchs = pair.step(given, target), pair.torchs(given, target)
        assert torch.equal(ours, torchs) or (ours.isnan() and torchs.isnan())
        assert reason in pair.step.reason
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        pair.step(x.float(), labels)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pair.step(x[:, 1:], labels)
    with pytest.raises(ValueError, match=r"Expected input batch_size \(8\)"):
        pair.step(x, labels[1:])


@pytest.mark.parametrize("which", ["the input is", "the labels require a gradient, or are"])
def test_tensors_of_inference_mode(which):
    pair = Pair(sequential())
    x, labels = pair.batch()
    with torch.inference_mode():
        x, labels = (x.clone(), labels) if "input" in which else (x, labels.clone())
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        pair.step(x, labels)
    assert f"{which} of inference mode" in pair.step.reason


def test_targets_that_torch_broadcasts():
    pair = Pair(sequential(), lambda p: SGD(p, lr=1e-3), nn.MSELoss())
    x, target = pair.batch()[0], torch.randn(ROWS, 1).double()
    with pytest.warns(UserWarning, match="different to the input size"):
        assert torch.equal(pair.step(x, target), pair.torchs(x, target))
    assert "not of the output's dtype and shape" in pair.step.reason


class MineCrossEntropy(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return 2 * super().forward(input, target)


@pytest.mark.parametrize(
    "loss",
    [nn.NLLLoss(), MineCrossEntropy(), lambda y, t: 2 * F.cross_entropy(y, t)],
    ids=["another module", "a subclass", "a function"],
)
def test_other_losses(loss):
    assert_torchs(Pair(sequential(), loss=loss), "the loss is ")


class MineSGD(SGD):
    pass


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.NAdam, MineSGD])
def test_other_optimizers(kind):
    pair = Pair(sequential(), lambda p: kind(p, lr=0.01))
    assert_torchs(pair, f"the optimizer is {kind.__name__}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    assert_torchs(Pair(sequential(), dtype=dtype), "not all float32, or all float64")


def test_a_step_that_was_replaced_beneath_a_scheduler():
    pair = Pair(sequential())
    for optimizer in (pair.optimizer, pair.twins_optimizer):
        lr_scheduler.StepLR(optimizer, 1)
    pair.train()
    assert pair.step.reason is None
    for optimizer in (pair.optimizer, pair.twins_optimizer):
        with_step(optimizer)
    assert_torchs(pair, "step was replaced")


def test_a_step_that_the_class_replaced(monkeypatch):
    pair = Pair(sequential())
    pair.train()
    whole = SGD.step
    monkeypatch.setattr(SGD, "step", lambda self: [whole(self), whole(self)])
    assert_torchs(pair, "is not torch's")


@pytest.mark.parametrize(
    "limit, processor",
    [
        ("MOST_TRAINED", {"_GENERIC": False}),
        ("MOST_TRAINED_BY_MKL", {"_GENERIC": False, "_INTEL": True}),
        ("MOST_TRAINED_GENERIC", {"_GENERIC": True}),
    ],
)
def test_large_networks_are_torchs(limit, processor, monkeypatch):
    for name, value in processor.items():
        monkeypatch.setattr(_products, name, value)
    pair = Pair(sequential(), lambda p: Adam(p, lr=0.01))
    pair.train(2)
    assert pair.step.reason is None
    work = ROWS * (IN * HIDDEN + HIDDEN * OUT)
    monkeypatch.setattr(_products, limit, work - 1)
    assert_torchs(pair, "the network is large")
    monkeypatch.setattr(_products, limit, work)
    pair.train()
    assert pair.step.reason is None
