"""The native linear+ReLU and MLP ops against the oracle in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fastattn
from fastattn import ops, reference
from fastattn.testing import assert_close, unit_roundoff
from fastattn.verification.shapes import LINEAR

pytestmark = pytest.mark.native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# rows, in_features, out_features
SHAPES = [
    LINEAR["digits, 64 rows"][1:],
    (1, 5, 3),
    (100, 600, 77),
    (200, 64, 300),
    (0, 4, 5),
    (7, 0, 9),
    (3, 4, 0),
    (33, 1100, 17),
    # few rows: dot products, rows of the weight that pass by, their remainders
    (1, 1100, 77),
    (2, 70, 1037),
    (5, 2100, 66),
    (13, 300, 131),
    # the weight's gradient of one row: in the caches, and past them
    (1, 128, 300),
    (1, 1024, 1040),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_relu(dtype, shape, bias):
    m, k, n = shape
    x = torch.randn(m, 2 * k, dtype=dtype)[:, :k]
    w = torch.randn(n, k, dtype=dtype)
    b = torch.randn(n, dtype=dtype) if bias else None
    out, mask = ops.linear_relu_forward(x, w, b)
    wide = [t.double() if t is not None else None for t in (x, w, b)]
    u = unit_roundoff(dtype)
    accumulator = u if dtype == torch.float64 else unit_roundoff(torch.float32)
    expected = reference.linear_relu(*wide)
    # K products summed in the accumulator's type, then one rounding.
    summed = wide[0].abs() @ wide[1].abs().T + 1
    assert_close("out", out, expected, u * expected.abs() + accumulator * (k + 2) * summed)

    passes = ~(out <= 0)
    bits = (mask[:, torch.arange(n) // 8] >> (torch.arange(n) % 8)) & 1
    assert torch.equal(bits.bool(), passes)
    grad = torch.randn_like(out)
    actual = ops.linear_relu_backward(grad, x, w, mask, [True] * 3)
    wanted = reference.linear_relu_backward(grad.double(), wide[0], wide[1], passes)
    least = torch.finfo(dtype).smallest_normal * u  # the rounding of a number below the normal ones
    g = torch.where(passes, grad.double(), 0.0).abs()
    sums = (g @ wide[1].abs(), g.T @ wide[0].abs(), g.sum(0))
    for name, a, b_, s in zip(("dx", "dw", "db"), actual, wanted, sums, strict=True):
        assert_close(name, a, b_, u * b_.abs() + accumulator * (max(m, n) + 2) * s + least)
    unneeded = ops.linear_relu_backward(grad, x, w, mask, [False, False, True])
    assert [t.numel() for t in unneeded[:2]] == [0, 0]
    assert torch.equal(unneeded[2], actual[2])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_mlp(dtype):
    widths = [100, 128, 50, 10]
    w = [torch.randn(o, i, dtype=dtype) / math.sqrt(i) for i, o in itertools.pairwise(widths)]
    b = [torch.randn(128, dtype=dtype), torch.empty(0, dtype=dtype), torch.randn(10, dtype=dtype)]
    x = torch.randn(3, 33, 100, dtype=dtype)
    out, *hidden = ops.mlp_forward(x, w, b)
    leaves = [t.double().requires_grad_() for t in (x, *w, b[0], b[2])]
    expected = reference.mlp(leaves[0], leaves[1:4], [leaves[4], None, leaves[5]])
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    grad = torch.randn_like(out)
    actual = ops.mlp_backward(grad, x, w, hidden, [True] * 5 + [False, True])
    assert actual[5].numel() == 0
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    for a, b_ in zip([*actual[:5], actual[6]], wanted, strict=True):
        torch.testing.assert_close(a.double(), b_, atol=tolerance * 10, rtol=tolerance * 10)


def test_a_nan_stays_a_nan_and_passes_its_gradient_as_in_torch():
    x = torch.tensor([[math.nan, 1.0]])
    w = torch.ones(2, 2)
    out, mask = ops.linear_relu_forward(x, w, None)
    assert out.isnan().all()
    assert mask.item() == 0b11


@pytest.mark.parametrize(
    "argument, call",
    [
        ("weight", lambda o: o.linear_relu_forward(torch.ones(2, 3), torch.ones(4, 5), None)),
        ("weight", lambda o: o.linear_relu_forward(torch.ones(2, 3), torch.ones(3), None)),
        (
            "weight",
            lambda o: o.linear_relu_forward(torch.ones(2, 3), torch.ones(4, 3).double(), None),
        ),
        (
            "bias",
            lambda o: o.linear_relu_forward(torch.ones(2, 3), torch.ones(4, 3), torch.ones(5)),
        ),
        ("input", lambda o: o.linear_relu_forward(torch.ones(()), torch.ones(4, 3), None)),
        ("biases", lambda o: o.mlp_forward(torch.ones(2, 3), [torch.ones(4, 3)], [])),
        ("weights", lambda o: o.mlp_forward(torch.ones(2, 3), [], [])),
        (
            "weight",
            lambda o: o.mlp_forward(
                torch.ones(2, 3),
                [torch.ones(4, 3), torch.ones(2, 5)],
                [torch.ones(4), torch.ones(2)],
            ),
        ),
        (
            "mask",
            lambda o: o.linear_relu_backward(
                torch.ones(2, 4),
                torch.ones(2, 3),
                torch.ones(4, 3),
                torch.ones(1, 1, dtype=torch.uint8),
                [True] * 3,
            ),
        ),
        (
            "grad_out",
            lambda o: o.linear_relu_backward(
                torch.ones(2, 5),
                torch.ones(2, 3),
                torch.ones(4, 3),
                torch.ones(2, 1, dtype=torch.uint8),
                [True] * 3,
            ),
        ),
        (
            "hidden",
            lambda o: o.mlp_backward(
                torch.ones(2, 4), torch.ones(2, 3), [torch.ones(4, 3)], [torch.ones(1)], [True] * 3
            ),
        ),
        (
            "needs",
            lambda o: o.mlp_backward(
                torch.ones(2, 4), torch.ones(2, 3), [torch.ones(4, 3)], [], [True]
            ),
        ),
    ],
)
def test_a_direct_call_with_bad_metadata_raises(argument, call):
    with pytest.raises(RuntimeError, match=f"{argument}: expected .*, got"):
        call(torch.ops.fastattn)


@pytest.mark.parametrize("rows", [0, 1, 1920, 4001])
def test_inference_is_the_forward_without_its_hidden_activations(rows):
    x = torch.randn(rows, 40)[:, 3:33]
    w = [torch.randn(21, 30), torch.randn(64, 21), torch.randn(5, 64)]
    b = [torch.randn(21), torch.empty(0), torch.randn(5)]
    out = ops.mlp_inference(x, w, b)
    torch.testing.assert_close(out, ops.mlp_forward(x, w, b)[0])
    assert ops.mlp_inference(x.unsqueeze(1), w, b).shape == (rows, 1, 5)


def test_no_grad_takes_the_inference_op(monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "mlp_inference", lambda *a: calls.append(a) or torch.zeros(2, 4))
    with torch.no_grad():
        fastattn.mlp(torch.ones(2, 3), [torch.ones(5, 3), torch.ones(4, 5)])
    assert len(calls) == 1
