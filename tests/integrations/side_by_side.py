"""Models with patch and without, side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook

import fastattn
from fastattn.functional import _served

# Tracers and compilers of torch warn of what they are about to lose.
MARKS = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
Make = Callable[[], nn.Module]
Run = Callable[[nn.Module], object]


@pytest.fixture(params=["kernels", "torch's functions"])
def small_or_not(request, monkeypatch) -> None:
    """With the kernels, and with the layers of small inputs called straight."""
    if request.param == "torch's functions":
        monkeypatch.setattr(_served, "LEAST_WORK", 1 << 62)


def pair(make: Make, dropout: bool = True) -> tuple[nn.Module, nn.Module]:
    stock = make()
    ours = copy.deepcopy(stock)
    assert fastattn.patch(ours, dropout=dropout).swapped
    return stock, ours


def outcome(run: Run, model: nn.Module) -> object:
    torch.manual_seed(1)
    try:
        return run(model)
    except Exception as error:
        return error


def assert_same(make: Make, run: Run, edit: Run | None = None, dropout: bool = True) -> None:
    """The same result, or the same error, with patch and without; ``edit`` comes after patch."""
    stock, ours = pair(make, dropout)
    for model in (stock, ours):
        torch.manual_seed(2)
        if edit is not None:
            edit(model)
    compare(outcome(run, ours), outcome(run, stock))


def compare(actual: object, expected: object) -> None:
    if isinstance(expected, Exception):
        assert type(actual) is type(expected), f"{actual!r}, without patch {expected!r}"
        assert str(actual)[:60] == str(expected)[:60]
    elif isinstance(expected, Tensor | tuple | dict):
        if isinstance(expected, Tensor) and expected.is_nested:
            actual, expected = (t.to_padded_tensor(0.0) for t in (actual, expected))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    else:
        assert actual == expected


def twice_the_output(module: nn.Module) -> Run:
    return module.register_forward_hook(lambda m, args, out: 2 * out)


def operations(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes]


def globally_hooked(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Which modules a hook for all modules sees, and what they return."""
    names = {module: name for name, module in model.named_modules()}
    seen: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        seen[names[module]] = (out if isinstance(out, Tensor) else out[0]).detach()

    handle = register_module_forward_hook(hook)
    try:
        model(x)
    finally:
        handle.remove()
    return seen
