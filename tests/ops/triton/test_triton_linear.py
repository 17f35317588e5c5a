"""The Triton linear+ReLU kernels, and the way by cuBLAS, against the oracle in float64."""

from __future__ import annotations

import math

import pytest
import torch

import fastattn
from fastattn import ops, reference
from fastattn.ops.triton import config
from fastattn.testing import assert_close

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (17, 20, 9), (33, 7, 40), (70, 31, 17)]  # M, K, N


@pytest.fixture(params=[True, False], ids=["fused", "cublas"])
def fused(request, monkeypatch):
    monkeypatch.setattr(config, "fused_product", lambda *_: request.param)


def inputs(m, k, n, dtype, device):
    x = torch.randn(m, k + 3, dtype=dtype, device=device)[:, 2 : k + 2]
    w = torch.randn(n, k, dtype=dtype, device=device)
    return x, w, torch.randn(n, dtype=dtype, device=device)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(dtype, shape, bias, fused, device):
    x, w, b = inputs(*shape, dtype, device)
    b = b if bias else None
    wide = [t if t is None else t.double() for t in (x, w, b)]
    out, bits = ops.linear_relu_forward(x, w, b, "triton")
    expected, passes = reference.linear_relu_forward(*wide)
    k = shape[1]
    unit = (
        torch.finfo(dtype).eps
        + k * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    )
    size = wide[0].abs() @ wide[1].abs().T + 4
    assert_close("out", out, expected, unit * size)
    columns = torch.arange(shape[2], device=device)
    seen = (bits[:, columns // 8] >> (columns % 8)) & 1 != 0
    assert torch.equal(
        seen | (expected.abs() < unit * size), passes | (expected.abs() < unit * size)
    )
    assert torch.equal(seen, ~(out <= 0))

    grad = torch.randn(shape[0], shape[2], dtype=dtype, device=device)
    grads = ops.linear_relu_backward(grad, x, w, bits, [True, True, bias], "triton")
    wanted = reference.linear_relu_backward(grad.double(), wide[0], wide[1], seen)
    for name, a, e in zip(("dx", "dw", "db"), grads, wanted, strict=True):
        if name == "db" and not bias:
            assert a.numel() == 0
            continue
        depth = shape[2] if name == "dx" else shape[0]
        limit = (2 * torch.finfo(dtype).eps + depth * 2e-7 * (dtype != torch.float64)) * (
            e.abs().max() + 4 * math.sqrt(depth)
        )
        assert_close(name, a, e, limit + 1e-13)


def test_an_expanded_gradient_a_nan_and_no_rows(fused, device):
    x, w, b = inputs(20, 5, 9, torch.float32, device)
    x[3, 2] = math.nan
    x.requires_grad_(), w.requires_grad_()
    out = fastattn.linear_relu(x, w, b, backend="triton")
    assert out[3].isnan().all()
    out[4:].sum().backward()
    expected = torch.autograd.grad(reference.linear_relu(x, w, b)[4:].sum(), x)[0]
    torch.testing.assert_close(x.grad[4:], expected[4:])
    empty = torch.randn(0, 5, device=device, requires_grad=True)
    out = fastattn.linear_relu(empty, w, b, backend="triton")
    assert out.shape == (0, 9)
    (grad,) = torch.autograd.grad(out.sum(), w)
    assert not grad.any()


def test_gradcheck_of_mlp(fused, device):
    x = torch.randn(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    weights = [
        torch.randn(n, k, dtype=torch.float64, device=device, requires_grad=True)
        for n, k in ((5, 4), (6, 5), (2, 6))
    ]
    bias = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)

    def function(x, bias, *weights):
        return fastattn.mlp(x, weights, [bias, None, None], backend="triton")

    assert torch.autograd.gradcheck(function, (x, bias, *weights), fast_mode=True)


def test_many_rows_are_added_in_parts(device, monkeypatch):
    monkeypatch.setattr(config, "fused_product", lambda *_: True)
    x, w, b = inputs(200, 6, 10, torch.float32, device)
    out, bits = ops.linear_relu_forward(x, w, b, "triton")
    grad = torch.randn_like(out)
    grads = ops.linear_relu_backward(grad, x, w, bits, [False, True, True], "triton")
    wanted = reference.linear_relu_backward(grad, x, w, out > 0)
    torch.testing.assert_close(grads[1:], wanted[1:], atol=1e-4, rtol=1e-5)


def test_explain_says_how(device):
    x = torch.randn(4, 64, dtype=torch.bfloat16, device=device)
    w = torch.randn(32, 64, dtype=torch.bfloat16, device=device)
    explanation = str(fastattn.backends.explain("linear_relu", x, w, backend="triton"))
    assert "triton (one fused kernel)" in explanation
    explanation = fastattn.backends.explain("linear_relu", x.float(), w.float(), backend="triton")
    assert "cuBLAS" in str(explanation)


@pytest.mark.parametrize(
    "argument, change",
    [
        ("weight", {"weight": torch.zeros(3, 4)}),
        ("weight", {"weight": torch.zeros(3, 5).double()}),
        ("bias", {"bias": torch.zeros(4)}),
    ],
)
def test_a_direct_call_with_bad_metadata_raises(argument, change, device):
    good = {"input": torch.randn(2, 5), "weight": torch.randn(3, 5), "bias": torch.randn(3)}
    call = {name: x.to(device) for name, x in (good | change).items()}
    with pytest.raises(RuntimeError, match=f"{argument}: expected .*, got"):
        torch.ops.fastattn_triton.linear_relu_forward(**call)
