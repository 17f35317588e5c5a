"""Sizes of 0 in every dimension, for every function of the linear family, dtype and derivative:
torch's results, exactly. All numbers are small integers, which no dtype rounds."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp

import fastattn

pytestmark = pytest.mark.native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# 8 and 9: enough depth for the kernel of few rows, more columns than a byte of the bit-mask.
LAYERS = list(itertools.product((0, 1, 3), (0, 1, 8), (0, 1, 9)))  # rows, in, out
STACKS = list(itertools.product((0, 1, 3), (0, 1, 8), (0, 1, 8), (0, 2)))  # rows, in, hidden, out


def integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-1, 2, shape).to(dtype)


def layer(x, w, b=None):
    return F.relu(F.linear(x, w, b))


def torchs_mlp(x, w, v, b=None, c=None):
    return F.linear(layer(x, w, b), v, c)


def our_mlp(x, w, v, b=None, c=None):
    return fastattn.mlp(x, [w, v], [b, c])


def derivatives(function, inputs, tangents, cotangent):
    """The result without a graph, and with one: the result, its tangent, the gradients and the
    gradients of their products with the tangents."""
    with torch.no_grad():
        found = [function(*inputs)]
    found += jvp(function, tuple(inputs), tuple(tangents))
    leaves = [x.clone().requires_grad_() for x in inputs]
    weight = cotangent.clone().requires_grad_()
    grads = torch.autograd.grad(function(*leaves), leaves, weight, create_graph=True)
    found += grads
    again = torch.autograd.grad(grads, [weight, *leaves], tangents, allow_unused=True)
    # A derivative that does not depend on a leaf may be None or 0.
    found += [
        torch.zeros_like(x) if g is None else g
        for g, x in zip(again, [weight, *leaves], strict=True)
    ]
    return [x.detach() for x in found]


def assert_same(ours, theirs, shapes, dtype):
    inputs = [integers(*shape, dtype=dtype) for shape in shapes]
    tangents = [integers(*shape, dtype=dtype) for shape in shapes]
    cotangent = torch.randint(-1, 2, theirs(*inputs).shape).to(dtype)
    actual = derivatives(ours, inputs, tangents, cotangent)
    expected = derivatives(theirs, inputs, tangents, cotangent)
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == dtype
        assert torch.equal(a, b), (number, shapes, a, b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_relu(dtype, bias):
    for m, k, n in LAYERS:
        shapes = [(m, k), (n, k)] + [(n,)] * bias
        assert_same(lambda *x: fastattn.linear_relu(*x, backend="cpu"), layer, shapes, dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlp(dtype, bias):
    for m, k, h, n in STACKS:
        shapes = [(m, k), (h, k), (n, h)] + [(h,), (n,)] * bias
        assert_same(our_mlp, torchs_mlp, shapes, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_one_dimension_of_rows(dtype):
    for shape in ((0, 3, 4), (3, 0, 4), (2, 3, 0), (0, 0, 0)):
        shapes = [shape, (5, shape[-1]), (5,)]
        assert_same(lambda *x: fastattn.linear_relu(*x, backend="cpu"), layer, shapes, dtype)
        assert_same(our_mlp, torchs_mlp, [*shapes[:2], (2, 5), (5,), (2,)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modules(dtype):
    for m, k, n in LAYERS:
        x = integers(m, k, dtype=dtype)
        for ours in (
            fastattn.nn.Linear(k, n, dtype=dtype),
            fastattn.nn.LinearReLU(k, n, dtype=dtype),
        ):
            weight, bias = ours.weight.data, ours.bias.data
            weight.copy_(integers(n, k, dtype=dtype))
            bias.copy_(integers(n, dtype=dtype))
            expected = F.linear(x, weight, bias)
            if isinstance(ours, fastattn.nn.LinearReLU):
                expected = F.relu(expected)
            assert torch.equal(ours(x), expected), (type(ours), m, k, n)
