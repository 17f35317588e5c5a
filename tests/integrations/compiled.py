"""Calls through torch.compile(backend="fastattn") beside the calls themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn

KERNELS = (
    "activation_dropout", "dropout_add_norm", "gated_mlp", "linear", "linear_relu", "mlp",
    "multi_linear", "scaled_dot_product_attention",
)  # fmt: skip
MARKS = [pytest.mark.native, pytest.mark.filterwarnings("error::fastattn.FastAttnWarning")]


@pytest.fixture(autouse=True)
def no_graph_of_another_test():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fused() -> list[str]:
    """What the backend put in, in the order of the graphs."""
    return [entry.after.removeprefix("fastattn ") for entry in fastattn.compile_report().swapped]


@pytest.fixture
def kernel_calls(monkeypatch) -> list[str]:
    """The kernels that ran."""
    calls = []
    for name in KERNELS:
        kernel = getattr(fastattn.functional, name)

        def counted(*args, name=name, kernel=kernel, **options):
            calls.append(name)
            return kernel(*args, **options)

        monkeypatch.setattr(fastattn.functional, name, counted)
    return calls


@pytest.fixture
def torchs_draws(monkeypatch) -> None:
    """Kernels that drop elements are torch's operations, whose draws a test can compare."""
    kernels = fastattn.functional
    linear, rows = kernels.linear, kernels.activation_dropout
    norm = kernels.dropout_add_norm

    def drawn_linear(x, weight, bias, activation, p=0.0):
        return drawn_rows(linear(x, weight, bias, activation), None, p)

    def drawn_rows(x, activation, p=0.0):
        out = rows(x, activation) if activation else x
        return F.dropout(out, p) if p else out

    def drawn_norm(x, residual, weight, bias, p, *options, **named):
        x = F.dropout(x, p) if p else x
        return norm(x, residual, weight, bias, 0.0, *options, **named)

    monkeypatch.setattr(kernels, "linear", drawn_linear)
    monkeypatch.setattr(kernels, "activation_dropout", drawn_rows)
    monkeypatch.setattr(kernels, "dropout_add_norm", drawn_norm)


def unsupported() -> str:
    return "\n".join(entry.reason for entry in fastattn.compile_report().skipped)


def assert_same(
    call: Callable[..., Tensor], *inputs: Tensor, parameters: list[Tensor] | None = None
) -> None:
    """The compiled call gives the call's result and gradients, from the same seed."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.manual_seed(1)
    expected = call(*leaves)
    torch.manual_seed(1)
    actual = torch.compile(call, backend="fastattn")(*leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    if not expected.requires_grad:
        assert not actual.requires_grad
        return
    wanted = [*leaves, *(parameters or [])]
    cotangent = torch.randn_like(expected)
    found = [torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
             for out in (actual, expected)]  # fmt: skip
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    """The digit classifier with a forward of its own."""

    def __init__(self, relu: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(20, 16), nn.Linear(16, 10)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(x)))
