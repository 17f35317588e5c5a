"""A training by ``TrainingStep`` is torch's: every option, schedulers, checkpoints."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop, lr_scheduler
from training_models import IN, MODELS, OUT, ROWS, Functional, Pair, sequential

from fastattn.training import TrainingStep

pytestmark = pytest.mark.native

OPTIONS = {
    "SGD": (SGD, {"lr": 0.05}),
    "momentum": (SGD, {"lr": 0.05, "momentum": 0.9}),
    "dampening": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "nesterov": (SGD, {"lr": 0.02, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    "maximize": (SGD, {"lr": 0.001, "momentum": 0.9, "maximize": True}),
    "integers": (SGD, {"lr": 1, "momentum": 0, "weight_decay": 0}),
    "Adam": (Adam, {"lr": 0.01}),
    "Adam, all": (
        Adam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.02,
               "amsgrad": True},
    ),
    "Adam, small betas": (Adam, {"lr": 0.01, "betas": (0.2, 0.3)}),
    "Adam, no betas": (Adam, {"lr": 0.001, "betas": (0.0, 0.0)}),
    "Adam, maximize": (Adam, {"lr": 0.001, "maximize": True, "amsgrad": True}),
    "Adam, decoupled": (Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW, amsgrad": (AdamW, {"lr": 0.01, "amsgrad": True, "foreach": True}),
    "RMSprop": (RMSprop, {"lr": 0.005}),
    "RMSprop, alpha": (RMSprop, {"lr": 0.005, "alpha": 0.4, "eps": 1e-3, "weight_decay": 0.1}),
    "RMSprop, momentum": (RMSprop, {"lr": 0.001, "momentum": 0.9}),
    "RMSprop, centered": (
        RMSprop, {"lr": 0.001, "centered": True, "momentum": 0.5, "maximize": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_200_steps(name):
    kind, options = OPTIONS[name]
    pair = Pair(sequential(), lambda p: kind(p, **options))
    pair.train(200, rtol=1e-9, atol=1e-11)
    assert pair.step.reason is None


@pytest.mark.parametrize("kind", [SGD, Adam, RMSprop])
def test_float32(kind):
    pair = Pair(sequential(), lambda p: kind(p, lr=0.01), dtype=torch.float32)
    pair.train(20, rtol=1e-4, atol=1e-5)
    assert pair.step.reason is None


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_torchs_fused_optimizers(kind):
    pair = Pair(sequential(), lambda p: kind(p, lr=0.01, fused=True))
    pair.train(20)
    assert pair.step.reason is None


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    pair = Pair(MODELS[name](), lambda p: Adam(p, lr=0.01))
    pair.train(10)
    assert pair.step.reason is None


def test_images():
    pair = Pair(Functional())
    x, labels = pair.batch()
    for images in (x.view(ROWS, 1, 3, 4), x.view(ROWS, 1, 4, 3).transpose(2, 3).contiguous()):
        torch.testing.assert_close(pair.step(images, labels), pair.torchs(images, labels))
        assert pair.step.reason is None
    pair.compare()
    images = x.view(ROWS, 1, 4, 3).transpose(2, 3)  # torch refuses to view these as rows
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        pair.step(images, labels)
    assert "cannot be reshaped" in pair.step.reason


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses(reduction):
    weight = torch.rand(OUT, dtype=torch.float64)
    for loss in (
        nn.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1),
        nn.CrossEntropyLoss(weight, reduction=reduction, ignore_index=2),
        F.cross_entropy,
    ):
        pair = Pair(sequential(), loss=loss)
        pair.train(3)
        assert pair.step.reason is None
    for loss in (nn.MSELoss(reduction=reduction), F.mse_loss):
        pair = Pair(sequential(), lambda p: SGD(p, lr=0.001), loss=loss)
        x, targets = pair.batch()[0], torch.randn(ROWS, OUT, dtype=torch.float64)
        for _ in range(3):
            torch.testing.assert_close(pair.step(x, targets), pair.torchs(x, targets))
        pair.compare()
        assert pair.step.reason is None


def test_the_first_step_makes_the_state():
    for kind, reason in ((SGD, None), (Adam, "state is not there yet")):
        pair = Pair(sequential(), lambda p, kind=kind: kind(p, lr=0.01))
        pair.train()
        assert (pair.step.reason is None) == (reason is None)
        assert reason is None or reason in pair.step.reason
        pair.train()
        assert pair.step.reason is None


def groups_of(parameters, kind, **options):
    first, *others = list(parameters)
    return kind([{"params": others}, {"params": [first], "lr": 0.003, "weight_decay": 0.1}],
                **options)  # fmt: skip


def test_parameter_groups():
    for kind in (SGD, Adam, RMSprop):
        pair = Pair(sequential(), lambda p, kind=kind: groups_of(p, kind, lr=0.01))
        pair.train(5)
        pair.optimizer.param_groups[0]["lr"] = pair.twins_optimizer.param_groups[0]["lr"] = 0.1
        pair.train(5)
        assert pair.step.reason is None


def test_a_momentum_in_one_group_alone():
    def make(parameters):
        first, *others = list(parameters)
        return SGD([{"params": others}, {"params": [first], "momentum": 0.9}], lr=0.01)

    pair = Pair(sequential(), make)
    pair.train(5)
    assert pair.step.reason is None


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_schedulers(kind, name):
    options = {"momentum": 0.9} if kind is SGD else {}
    pair = Pair(sequential(), lambda p: kind(p, lr=0.1, **options))
    scheduler = SCHEDULERS[name](pair.optimizer)
    twins = SCHEDULERS[name](pair.twins_optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            pair.train()
            scheduler.step()
            twins.step()
    assert pair.step.reason is None
    assert scheduler.get_last_lr() == twins.get_last_lr()


def test_a_scheduler_sees_the_first_step_even_if_it_is_the_kernels():
    pair = Pair(sequential())
    scheduler = lr_scheduler.StepLR(pair.optimizer, 1)
    pair.train()
    assert pair.step.reason is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


@pytest.mark.parametrize("kind", [SGD, Adam, RMSprop])
def test_checkpoints_and_taking_turns(kind):
    options = {} if kind is Adam else {"momentum": 0.9}
    pair = Pair(sequential(), lambda p: kind(p, lr=0.01, **options))
    pair.train(5)
    saved = copy.deepcopy((pair.model.state_dict(), pair.optimizer.state_dict()))
    pair.twin.load_state_dict(saved[0])
    pair.twins_optimizer.load_state_dict(saved[1])
    pair.train(5)
    # The other way round: torch's checkpoint goes on by the kernel, with torch's steps between.
    pair.model.load_state_dict(pair.twin.state_dict())  # copies
    pair.optimizer.load_state_dict(copy.deepcopy(pair.twins_optimizer.state_dict()))
    for _ in range(3):
        x, labels = pair.batch()
        pair.loss(pair.model(x), labels).backward()
        pair.optimizer.step()
        pair.torchs(x, labels)
        pair.train(2)
        assert pair.step.reason is None


def test_gradients_from_elsewhere_are_dropped():
    pair = Pair(sequential())
    pair.model(pair.batch()[0]).sum().backward()
    pair.train()
    assert pair.step.reason is None


def test_labels_that_are_no_class():
    pair = Pair(sequential(), lambda p: Adam(p, lr=0.01))
    pair.train(3)
    x, labels = pair.batch()
    labels[3] = OUT
    with pytest.raises(IndexError, match=f"Target {OUT} is out of bounds"):
        pair.step(x, labels)
    pair.compare(rtol=1e-10, atol=1e-12)
    pair.train(3)


def test_a_stale_graph_is_detected():
    pair = Pair(sequential(), lambda p: SGD(p, lr=0.1, momentum=0.9))
    pair.train(2)
    out = pair.model(pair.batch()[0])
    versions = [p._version for p in pair.model.parameters()]
    pair.train()
    assert pair.step.reason is None
    assert all(p._version > v for p, v in zip(pair.model.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_batches_of_any_size_and_layout():
    pair = Pair(sequential())
    for rows in (1, 2, 33):
        x, labels = pair.batch(rows)
        for given in (x, x.t().contiguous().t(), x[:1].expand(rows, IN), x.repeat(1, 2)[:, :IN]):
            torch.testing.assert_close(pair.step(given, labels), pair.torchs(given, labels))
            assert pair.step.reason is None
    pair.compare(rtol=1e-10, atol=1e-12)


def test_arguments_of_other_types():
    model, loss = sequential(), nn.CrossEntropyLoss()
    optimizer = SGD(model.parameters())
    with pytest.raises(TypeError, match="model: expected an nn.Module, got function"):
        TrainingStep(lambda x: x, loss, optimizer)
    with pytest.raises(TypeError, match="loss: expected a function or module, got str"):
        TrainingStep(model, "cross entropy", optimizer)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got float"):
        TrainingStep(model, loss, 0.1)


def test_what_it_is_made_of_stays():
    pair = Pair(sequential())
    for name in ("model", "loss", "optimizer"):
        assert getattr(pair.step, name) is getattr(pair, name)
        with pytest.raises(AttributeError):
            setattr(pair.step, name, None)


def test_copies():
    pair = Pair(sequential(), lambda p: Adam(p, lr=0.01))
    pair.train(3)
    other = Pair(sequential(), lambda p: Adam(p, lr=0.01))
    for copied in (copy.deepcopy(pair.step), pickle.loads(pickle.dumps(pair.step))):
        other.step, other.model, other.optimizer = copied, copied.model, copied.optimizer
        other.twin.load_state_dict(pair.twin.state_dict())
        state = copy.deepcopy(pair.twins_optimizer.state_dict())
        other.twins_optimizer.load_state_dict(state)
        other.train(2)
        assert copied.reason is None
    pair.train(2)
    assert pair.step.reason is None
