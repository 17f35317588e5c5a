"""Torch's private names: which the package reaches, and that without one nothing is wrong."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastattn
from fastattn.functional import _torch_internals as internals

PACKAGE = Path(fastattn.__file__).parent

# Without one of these drop-ins run torch's code.
SAFE = {
    "torch._C._get_tracing_state": lambda m: m.watched(),
    "torch._C._len_torch_dispatch_stack": lambda m: m.watched(),
    "torch._C._len_torch_function_stack": lambda m: m.watched(),
    "torch._C._get_function_stack_at": lambda m: watched_on_a_device(m),
    "torch.utils._device.DeviceContext": lambda m: watched_on_a_device(m),
    "torch._subclasses.FakeTensor": lambda m: not isinstance(fake(), m.FakeTensor),
    "torch.nn.modules.module._has_any_global_hook": lambda m: m.any_global_hook(),
    "torch._C._autograd._top_saved_tensors_default_hooks": lambda m: m.packs_saved_tensors(),
}


def watched_on_a_device(module) -> bool:
    with torch.device("cpu"):
        return module.watched()


def fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(2)


# The others, with what happens in a torch that has none. None of it is a wrong result.
OTHERS = {
    "_problem.py": {"forward_ad._current_level": "AttributeError at the first kernel"},
    "functional/_autograd.py": {
        "torch._C._are_functorch_transforms_active": "Function.apply, which inspects more",
        "torch._functorch.utils.unwrap_dead_wrappers": "Function.apply",
        "torch._C._FunctionBase": "Function.apply",
        "torch._C._functorch.is_legacy_batchedtensor": "no gradients in batches; ops raise",
        "torch._C._AutoDispatchBelowAutograd": "AttributeError at the first kernel",
        "torch._C._get_tracing_state": "AttributeError at the first kernel",
        "forward_ad._current_level": "AttributeError at the first kernel",
    },
    "functional/_registration.py": {
        "torch._C._AutoDispatchBelowAutograd": "AttributeError at the first op",
        "torch._C._any_requires_grad": "AttributeError at the first op",
        "torch._C._is_fwd_grad_enabled": "AttributeError at the first op",
        "torch._C._after_autograd_keyset": "AttributeError at the first op",
        "forward_ad._current_level": "AttributeError at the first op",
    },
    "_products.py": {
        "torch.ops.mkldnn._is_mkldnn_bf16_supported": "torch's products",
        "torch.ops.mkldnn._is_mkldnn_fp16_supported": "torch's products",
        "torch.cpu._is_amx_tile_supported": "torch's products in float32",
    },
    "functional/_torch_internals.py": {
        "torch._C": "SAFE, as the names that it is asked for by string",
    },
    "integrations/sdpa.py": {
        "torch.jit._builtins._get_builtin_table": "no torch.jit.script within override_sdpa",
    },
    "verification/first_use.py": {
        "torch.cuda._is_in_bad_fork": "AttributeError at the first kernel on a GPU",
        "torch.utils._device.DeviceContext": "no check at first use",
        "torch.overrides._get_current_function_mode_stack": "no check at first use",
        "torch._C._len_torch_dispatch_stack": "no check at first use",
        "torch._C._are_functorch_transforms_active": "no check at first use",
        "torch.autograd.forward_ad._current_level": "no check at first use",
    },
    "verification/record.py": {"torch._C": "the driver is unknown"},
}  # fmt: skip


def private(name: str) -> bool:
    return any(re.match(r"_[^_]", part) for part in name.split("."))


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def private_names(source: str) -> set[str]:
    """The private names of torch that it reaches, the longest of each."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            found.add(dotted(node))
    found = {n for n in found if n.startswith(("torch.", "forward_ad.")) and private(n)}
    return {n for n in found if not any(m.startswith(f"{n}.") for m in found)}


def test_the_walker_sees_each_form():
    source = "import torch\nfrom torch._x import y\ntorch._C._z(torch.nn._a.b)\ntorch.__version__"
    assert private_names(source) == {"torch._x.y", "torch._C._z", "torch.nn._a.b"}


def test_the_table_is_whole():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        names = private_names(path.read_text())
        if names:
            found[str(path.relative_to(PACKAGE))] = names
    found.pop("cli/bench/linear.py", None)  # a peer that is timed
    assert {file: set(names) for file, names in OTHERS.items()} == {
        file: {re.sub(r"\.(__dict__|get)$", "", n) for n in names} for file, names in found.items()
    }


def test_this_torch_has_them():
    assert internals.LACKING == []
    names = {n for names in OTHERS.values() for n in names} | set(SAFE)
    for name in names:
        home, _, last = name.replace("forward_ad", "torch.autograd.forward_ad").rpartition(".")
        assert hasattr(eval(home, {"torch": torch}), last), name


@pytest.fixture
def reloaded():
    yield lambda: importlib.reload(internals)
    importlib.reload(internals)


@pytest.mark.parametrize("name", SAFE)
def test_without_a_name_the_answer_is_torchs_code(name, reloaded, monkeypatch):
    assert not SAFE[name](internals)
    home, _, last = name.rpartition(".")
    with monkeypatch.context() as patched:
        patched.delattr(eval(home, {"torch": torch}), last)
        module = reloaded()
    assert last in module.LACKING
    assert SAFE[name](module)


@pytest.mark.parametrize("when", ["pre", "post"])
def test_without_the_hooks_of_all_optimizers_there_may_be_some(when, reloaded, monkeypatch):
    optimizer = torch.optim.SGD([torch.ones(1)])
    assert not internals.has_step_hooks(optimizer)
    with monkeypatch.context() as patched:
        home = sys.modules["torch.optim.optimizer"]  # torch.optim deletes the name
        patched.delattr(home, f"_global_optimizer_{when}_hooks")
        module = reloaded()
    assert module.has_step_hooks(optimizer)


# What a call of a module may run besides its forward, and what is none of a call's business.
IN_A_CALL = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
OPTIONS = {
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
}
OF_THE_STATE = {
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}


def test_torch_has_no_other_hooks():
    assert {n for n in vars(nn.Module()) if "hook" in n} == IN_A_CALL | OPTIONS | OF_THE_STATE
    module = nn.ReLU()
    assert not internals.has_hooks(module)
    for name in IN_A_CALL:
        getattr(module, name)[0] = print
        assert internals.has_hooks(module)
        getattr(module, name).clear()
    del module._forward_hooks
    assert internals.has_hooks(module)


def test_a_torch_without_any_of_them():
    """Drop-ins give torch's results and call no kernel."""
    code = f"""
import torch, torch._dynamo
from torch import nn
removed = []
for name in {list(SAFE)}:
    home, _, last = name.rpartition(".")
    removed.append((eval(home), last, eval(name)))
    delattr(eval(home), last)
import fastattn.integrations.torch_nn
for home, last, found in removed:  # torch itself cannot run without them
    setattr(home, last, found)
from fastattn import functional
from fastattn.functional import _served
_served.LEAST_WORK = _served.LEAST_ATTENTION = 0
calls = []
for name in ("mlp", "linear_relu", "scaled_dot_product_attention"):
    whole = getattr(functional, name)
    setattr(functional, name, lambda *a, f=whole, **k: calls.append(f) or f(*a, **k))
layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
model = nn.Sequential(layer, nn.Linear(8, 8), nn.ReLU())
x = torch.randn(2, 5, 8)
expected = model(x)
assert len(fastattn.patch(model).swapped) == 3
torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
assert not calls
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
