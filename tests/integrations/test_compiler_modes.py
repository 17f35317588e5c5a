"""torch.compile(backend="fastattn") in other dtypes and under torch's modes and transforms."""

from __future__ import annotations

import contextlib

import compiled
import pytest
import torch
from compiled import (  # noqa: F401
    Net,
    assert_same,
    fused,
    kernel_calls,
    no_graph_of_another_test,
    unsupported,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytestmark = compiled.MARKS


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    net = Net().to(dtype)
    x = torch.randn(5, 20, dtype=dtype)
    actual, expected = torch.compile(net, backend="fastattn")(x), net(x)
    assert actual.dtype == dtype
    tolerance = {torch.float64: 1e-12}.get(dtype, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert fused() == ["mlp"]


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    net, x = Net(), torch.randn(5, 20)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    call = torch.compile(cast if inside else net, backend="fastattn")
    with contextlib.nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
        actual = call(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, cast(x), rtol=0.02, atol=0.01)
    assert fused() == ["mlp"]


def test_second_derivatives():
    net = Net().double()
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    call = torch.compile(net, backend="fastattn")
    torch.autograd.gradcheck(call, x)
    torch.autograd.gradgradcheck(call, x)
    assert fused() == ["mlp"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_run_again_in_the_backward(reentrant, kernel_calls):  # noqa: F811
    net = Net()

    def call(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=reentrant)

    x = torch.randn(5, 20, requires_grad=True)
    out = torch.compile(call, backend="fastattn")(x)
    assert kernel_calls == ["mlp"]
    out.sum().backward()
    assert kernel_calls == ["mlp", "mlp"]
    torch.testing.assert_close(x.grad, torch.autograd.grad(net(x).sum(), x)[0])


def test_a_transform_inside_the_model():
    net = Net()
    assert_same(lambda x: torch.func.vmap(net)(x), torch.randn(5, 20))
    assert_same(lambda x: torch.func.grad(lambda x: net(x).sum())(x), torch.randn(5, 20))
