"""A patched model means what it meant: every call, edit, mode and tool gives what it gives without
patch, results and errors alike."""

from __future__ import annotations

import copy
import functools
import io
import subprocess
import sys
from collections.abc import Callable

import pytest
import side_by_side
import torch
import torch.nn.functional as F
from side_by_side import (
    Run,
    assert_same,
    globally_hooked,
    operations,
    small_or_not,  # noqa: F401 (a fixture)
    twice_the_output,
)
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastattn

pytestmark = [*side_by_side.MARKS, pytest.mark.usefixtures("small_or_not")]


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(inplace=True),
        nn.LayerNorm(16), nn.Linear(16, 3), nn.ReLU(),
    )  # fmt: skip


@functools.cache
def batch() -> Tensor:
    """``[5, 8]``"""
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Doubles(torch.Tensor):
    """A tensor subclass with a meaning of its own for F.linear."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            return 2 * out if func is F.linear else out


# --- inputs ---------------------------------------------------------------------------------------

INPUTS = {
    "rows": lambda x: x,
    "one row": lambda x: x[0],
    "no rows": lambda x: x[:0],
    "a lazy minus": lambda x: torch._neg_view(x),
    "integers": lambda x: x.long(),
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "complex": lambda x: x.to(torch.complex64),
    "another width": lambda x: x[:, :7],
    "a number": lambda x: torch.tensor(1.0),
    "None": lambda x: None,
    "a list": lambda x: [1.0],
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:2]]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
    "subclass": lambda x: x.as_subclass(Doubles),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_inputs(name, autocast):
    given = INPUTS[name](batch())

    def run(model: nn.Module) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(given)
        return out if out.dtype != torch.bfloat16 else str((out.dtype, out.shape, type(out)))

    assert_same(stack, run)


def test_sparse_features_train():
    sparse = (batch() * (batch() > 0.5)).to_sparse()

    def run(model: nn.Module) -> object:
        model(sparse).square().sum().backward()
        return tuple(p.grad for p in model.parameters())

    assert_same(stack, run)


# --- edits after patch ----------------------------------------------------------------------------


def set_weight(value: Tensor) -> Run:
    def edit(model: nn.Module) -> None:
        del model[2].weight
        model[2].weight = value

    return edit


def another_width(model: nn.Module) -> None:
    model[0], model[2] = nn.Linear(8, 24), nn.Linear(24, 16)


EDITS = {
    "another activation": lambda m: m.__setitem__(1, nn.GELU()),
    "another width": lambda m: another_width(m),
    "a layer more": lambda m: m.append(nn.Linear(3, 2)),
    "a layer between": lambda m: m.insert(1, nn.Tanh()),
    "a layer less": lambda m: m.__delitem__(1),
    "a hook on a Linear": lambda m: twice_the_output(m[2]),
    "a hook on a ReLU": lambda m: twice_the_output(m[3]),
    "a pre-hook": lambda m: m[3].register_forward_pre_hook(lambda m, args: (args[0] - 1,)),
    "a hook on the whole": twice_the_output,
    "a forward of a layer": lambda m: setattr(m[1], "forward", torch.tanh),
    "a forward of the whole": lambda m: setattr(m, "forward", torch.tanh),
    "weight norm": lambda m: parametrizations.weight_norm(m[2]),
    "pruned": lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
    "a weight of a subclass": set_weight(torch.ones(16, 16).as_subclass(Doubles)),
    "a weight of one dimension": set_weight(torch.ones(16)),
    "a bias that broadcasts": lambda m: setattr(m[0], "bias", nn.Parameter(torch.ones(1))),
    "no weight": lambda m: delattr(m[0], "weight"),
    "a weight in float64": lambda m: m[2].double(),
    "one layer twice": lambda m: m.__setitem__(2, nn.Sequential(m[2], m[2])),
    "compiled layer": lambda m: m[1].compile(backend="eager"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edits(name):
    assert_same(stack, lambda m: m(batch()), EDITS[name])


def test_replaced_calls_of_modules_are_run(monkeypatch):
    """Tools that wrap the call of every module, to time it or to list it."""

    def run(model: nn.Module) -> list[str]:
        called: list[str] = []
        whole = nn.Module.__call__

        def call(module: nn.Module, *args: object) -> object:
            called.append(type(module).__name__)
            return whole(module, *args)

        with monkeypatch.context() as replaced:
            replaced.setattr(nn.Module, "__call__", call)
            model(batch())
        return called

    assert_same(stack, run)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["nn.Linear", "nn.ReLU", "nn.Sequential", "F.linear", "F.relu"])
def test_replaced_code_is_run(monkeypatch, what, when):
    """Tools that replace a forward or a function of torch's, for all modules."""
    home, name = (F, what[2:]) if what.startswith("F.") else (getattr(nn, what[3:]), "forward")
    whole = getattr(home, name)

    def replace() -> None:
        monkeypatch.setattr(home, name, lambda *a, **k: 2 * whole(*a, **k))

    model = stack()
    if when == "before":
        replace()
    ours = copy.deepcopy(model)
    fastattn.patch(ours)
    if when == "after":
        replace()
    torch.testing.assert_close(ours(batch()), model(batch()))
    monkeypatch.undo()
    torch.testing.assert_close(ours(batch()), model(batch()))


# --- modes and tools ------------------------------------------------------------------------------


class DoublesReLU(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is F.relu else out


def in_mode(mode: Callable[[], object]) -> Run:
    def run(model: nn.Module) -> object:
        with mode():
            return model(batch())

    return run


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model(batch()).sum().backward()
    return counter.get_total_flops()


def fake(model: nn.Module) -> object:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return tuple(model(torch.empty(5, 8)).shape)


def per_sample(model: nn.Module) -> object:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).sum()

    return vmap(grad(loss), (None, 0))(dict(model.named_parameters()), batch())["0.weight"]


def recomputed(model: nn.Module) -> object:
    checkpoint(model, batch().clone().requires_grad_(), use_reentrant=False).sum().backward()
    return model[0].weight.grad


def default_device(model: nn.Module) -> object:
    with torch.device("cpu"):
        return model(batch())


TOOLS = {
    "hooks for all modules": lambda m: globally_hooked(m, batch()),
    "a function mode": in_mode(DoublesReLU),
    "the default device": default_device,
    "flops": flops,
    "fake tensors": fake,
    "inference mode": in_mode(torch.inference_mode),
    "fx": lambda m: operations(fx.symbolic_trace(m).graph),
    "make_fx": lambda m: operations(make_fx(m)(batch()).graph),
    "make_fx, symbolic": lambda m: operations(make_fx(m, tracing_mode="symbolic")(batch()).graph),
    "export": lambda m: operations(torch.export.export(m, (batch(),)).graph),
    "jit.trace": lambda m: torch.jit.trace(m, batch())(batch()[:2]),
    "jit.script": lambda m: torch.jit.script(m)(batch()),
    "compile": lambda m: torch.compile(m, backend="aot_eager", fullgraph=True)(batch()),
    "per-sample gradients": per_sample,
    "forward mode": lambda m: jvp(m, (batch(),), (torch.ones_like(batch()),))[1],
    "hessian": lambda m: hessian(lambda x: m(x).square().sum())(batch()[0]),
    "checkpoint": recomputed,
    "quantize_dynamic": lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear})(batch()),
    "class of a slice": lambda m: [type(m[:2]), type(m + m), len(m[1:])],
}


@pytest.mark.parametrize("name", TOOLS)
def test_tools(name):
    assert_same(stack, TOOLS[name])


def test_the_meta_device():
    assert_same(lambda: stack().to("meta"), lambda m: tuple(m(batch().to("meta")).shape))


# --- other processes ------------------------------------------------------------------------------


def in_a_fresh_process(model: nn.Module, *args: Tensor) -> str:
    """What a process that only unpickles finds the model to be, once it gives the same there."""
    with torch.no_grad():
        out = model.eval()(*args)
    file = io.BytesIO()
    torch.save((model, args, out if isinstance(out, Tensor) else out[0]), file)
    code = (
        "import io, sys, torch\n"
        "file = io.BytesIO(sys.stdin.buffer.read())\n"
        "model, args, expected = torch.load(file, weights_only=False)\n"
        "with torch.no_grad():\n"
        "    out = model(*args)\n"
        "torch.testing.assert_close(out if torch.is_tensor(out) else out[0], expected)\n"
        "print(type(model).__module__, sorted(k for k in vars(model) if 'fastattn' in k))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], input=file.getvalue(), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode().strip()


def test_a_process_that_only_unpickles():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, *stack())
    assert fastattn.patch(model).swapped
    found = in_a_fresh_process(model, torch.randn(2, 5, 8))
    marks = ["_fastattn_former_class", "_fastattn_small_below"]
    assert found == f"fastattn.integrations.sequential {marks}"
