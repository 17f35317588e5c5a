"""Modes in which torch's operations mean more than their results: torch's loop runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_models import Pair, assert_torchs, halved, sequential

pytestmark = pytest.mark.native


def doubled(x: Tensor) -> Tensor:
    return 2 * x if x.is_floating_point() else x


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def hook_of_all_modules() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, out: None)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def hook_of_all_optimizers() -> Iterator[None]:
    handle = register_optimizer_step_post_hook(halved)
    try:
        yield
    finally:
        handle.remove()


MODES = {
    "a function mode": (Watching, "watched"),
    "a dispatch mode": (Counting, "watched"),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), "autocast"),
    "anomaly mode": (torch.autograd.detect_anomaly, "anomaly"),
    "saved tensors": (
        lambda: torch.autograd.graph.saved_tensors_hooks(doubled, lambda x: x), "hooks of",
    ),
    "a hook of all modules": (hook_of_all_modules, "for all modules"),
    "a hook of all optimizers": (hook_of_all_optimizers, "step has hooks"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", MODES)
def test_modes(name):
    mode, reason = MODES[name]
    pair = Pair(sequential(), dtype=torch.float32)
    pair.train(1, rtol=1e-5, atol=1e-6)
    assert pair.step.reason is None
    with mode():
        assert_torchs(pair, reason)
    pair.train(1, rtol=1e-5, atol=1e-6)
    assert pair.step.reason is None


def test_without_gradients_torchs_error():
    pair = Pair(sequential())
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        pair.step(*pair.batch())
    assert "gradients are off" in pair.step.reason


def test_a_default_device_is_no_obstacle():
    pair = Pair(sequential())
    with torch.device("cpu"):
        pair.train(2)
    assert pair.step.reason is None


def test_torch_compile_traces_torchs_loop(monkeypatch):
    pair = Pair(sequential())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not pair.step._prepared(*pair.batch())
    assert "watched or recorded" in pair.step.reason
