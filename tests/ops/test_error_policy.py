"""Every kernel in every dtype is as accurate as torch's own result in that dtype, measured against
the oracle in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import reference
from fastattn.testing import assert_accurate
from fastattn.verification.shapes import LINEAR

pytestmark = pytest.mark.native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 is the oracle's own
# batch, heads, seq_q, seq_k, head_dim, head_dim_v. Not one query: dV is then a single product, in
# which torch, where it keeps P itself, has next to no error to compare with.
ATTENTION = [(2, 2, 63, 111, 64, 64), (1, 2, 257, 257, 32, 32), (2, 4, 111, 513, 128, 17)]
LAYERS = [
    LINEAR["digits, 64 rows"][1:], (111, 300, 65), (1, 64, 10), (257, 33, 100),
    (1, 3000, 500), (3, 768, 1030), (15, 500, 2000),
]  # fmt: skip


def _gradients(function, leaves, cotangent):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


@pytest.mark.parametrize("mask_kind", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype, shape, mask_kind):
    batch, heads, seq_q, seq_k, dim, dim_v = shape
    leaves = [
        torch.randn(batch, heads, seq_q, dim, dtype=dtype),
        torch.randn(batch, heads, seq_k, dim, dtype=dtype),
        torch.randn(batch, heads, seq_k, dim_v, dtype=dtype),
    ]
    causal, mask = mask_kind == "causal", None
    if mask_kind == "bool":
        mask = torch.rand(batch, 1, seq_q, seq_k) > 0.3
        mask[..., 0] = True  # torch's gradients of empty rows are another contract
    if mask_kind == "float":
        leaves.append(torch.randn(1, heads, seq_q, seq_k, dtype=dtype))

    def masked(function):
        return lambda q, k, v, bias=mask: function(q, k, v, bias, 0.0, causal)

    def oracle(q, k, v, bias=mask):
        return reference.attention(q, k, v, bias, is_causal=causal)[0]

    def ours(q, k, v, bias=mask):
        return fastattn.scaled_dot_product_attention(q, k, v, bias, 0.0, causal, backend="cpu")

    cotangent = torch.randn(batch, heads, seq_q, dim_v, dtype=dtype)
    wide = _gradients(oracle, [x.double() for x in leaves], cotangent)
    peer = _gradients(masked(F.scaled_dot_product_attention), leaves, cotangent)
    actual = _gradients(ours, leaves, cotangent)
    for name, a, o, p in zip(("out", "dq", "dk", "dv", "dmask"), actual, wide, peer, strict=False):
        assert_accurate(name, a, o, p)


# magnitude, batch, queries, causal
SCORES = [(m, 2, 150, causal) for m in (1, 30, 300, 4000) for causal in (False, True)]
SCORES += [(m, 40, 2, False) for m in (1, 30, 300, 4000)]


def _of_scores(dtype, batch, rows, magnitude):
    """Query, key, value and cotangent whose scores are about ``magnitude``. Quarters make the sums
    of the scores exact in every order: where large scores are rounded, the rows whose two largest
    are nearly equal decide the error, and there are too few of them to compare."""
    q, k, v, cotangent = (torch.randn(batch, 2, n, 64) for n in (rows, 333, 333, rows))
    q, k = ((4 * x).round() / 4 for x in (q, k))
    return [x.to(dtype) for x in (magnitude * q, k, v, cotangent)]


@pytest.mark.parametrize(("magnitude", "batch", "rows", "causal"), SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_any_size(dtype, magnitude, batch, rows, causal):
    q, k, v, _ = _of_scores(dtype, batch, rows, magnitude)
    wide = reference.attention(*(x.double() for x in (q, k, v)), is_causal=causal)[0]
    peer = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    actual = fastattn.scaled_dot_product_attention(q, k, v, is_causal=causal, backend="cpu")
    assert_accurate("out", actual, wide, peer)


@pytest.mark.parametrize(("magnitude", "batch", "rows", "causal"), SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradients_of_scores_of_any_size(dtype, magnitude, batch, rows, causal):
    *leaves, cotangent = _of_scores(dtype, batch, rows, magnitude)

    def oracle(q, k, v):
        return reference.attention(q, k, v, is_causal=causal)[0]

    def peer(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def ours(q, k, v):
        return fastattn.scaled_dot_product_attention(q, k, v, is_causal=causal, backend="cpu")

    wide = _gradients(oracle, [x.double() for x in leaves], cotangent)
    theirs = _gradients(peer, leaves, cotangent)
    with sdpa_kernel(SDPBackend.MATH):  # the others make rows of P of the LSE as it is rounded
        theirs[-1] = _gradients(peer, leaves, cotangent)[-1]
    actual = _gradients(ours, leaves, cotangent)
    for name, a, o, p in zip(("out", "dq", "dk", "dv"), actual, wide, theirs, strict=True):
        assert_accurate(name, a, o, p)


# Broadcast over keys, rows, heads or batch; a whole column moves all scores of a row alike, and its
# gradient is 0.
MASKS = [(1, 1, 1, 1), (1, 1, 1, 320), (256, 1), (1, 1, 256, 320), (1, 4, 1, 320), (4, 1, 1, 320)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_broadcast_mask(dtype, shape):
    leaves = [torch.randn(4, 4, n, 64, dtype=dtype) for n in (256, 320, 320)]
    leaves.append(torch.randn(shape, dtype=dtype))
    cotangent = torch.randn(4, 4, 256, 64, dtype=dtype)

    def oracle(q, k, v, mask):
        return reference.attention(q, k, v, mask)[0]

    def ours(q, k, v, mask):
        return fastattn.scaled_dot_product_attention(q, k, v, mask, backend="cpu")

    wide = _gradients(oracle, [x.double() for x in leaves], cotangent)[-1]
    peer = _gradients(F.scaled_dot_product_attention, leaves, cotangent)[-1]
    assert_accurate("dmask", _gradients(ours, leaves, cotangent)[-1], wide, peer)


def _second(function, leaves, tangents, cotangent):
    """The output's tangent, the second derivatives of the leaves in the same direction."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    cotangent = cotangent.to(leaves[0].dtype).requires_grad_()
    grads = torch.autograd.grad(function(*leaves), leaves, cotangent, create_graph=True)
    products = sum((g * t.to(g.dtype)).sum() for g, t in zip(grads, tangents, strict=True))
    return torch.autograd.grad(products, [cotangent, *leaves])


@pytest.mark.parametrize("mask_kind", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_second_derivative_of_attention(dtype, shape, mask_kind):
    batch, heads, seq_q, seq_k, dim, dim_v = shape
    shapes = [(batch, heads, seq_q, dim), (batch, heads, seq_k, dim), (batch, heads, seq_k, dim_v)]
    causal, mask = mask_kind == "causal", None
    if mask_kind == "bool":
        mask = torch.rand(batch, 1, seq_q, seq_k) > 0.3
        mask[..., 0] = True
    if mask_kind == "float":
        shapes.append((1, heads, seq_q, seq_k))
    leaves, tangents = ([torch.randn(s, dtype=dtype) for s in shapes] for _ in range(2))

    def peer(q, k, v, bias=mask):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, bias, 0.0, causal)

    def oracle(q, k, v, bias=mask):
        return reference.attention(q, k, v, bias, is_causal=causal)[0]

    def ours(q, k, v, bias=mask):
        return fastattn.scaled_dot_product_attention(q, k, v, bias, 0.0, causal, backend="cpu")

    cotangent = torch.randn(batch, heads, seq_q, dim_v, dtype=dtype)
    wide = _second(oracle, [x.double() for x in leaves], tangents, cotangent)
    theirs = _second(peer, leaves, tangents, cotangent)
    actual = _second(ours, leaves, tangents, cotangent)
    for name, a, o, p in zip(("t_out", "gq", "gk", "gv", "gm"), actual, wide, theirs, strict=False):
        assert_accurate(name, a, o, p)


@pytest.mark.parametrize(("magnitude", "batch", "rows", "causal"), SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_second_derivative_of_scores_of_any_size(dtype, magnitude, batch, rows, causal):
    *leaves, cotangent = _of_scores(dtype, batch, rows, magnitude)
    tangents = [torch.randn_like(x) for x in leaves]

    def peer(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def oracle(q, k, v):
        return reference.attention(q, k, v, is_causal=causal)[0]

    def ours(q, k, v):
        return fastattn.scaled_dot_product_attention(q, k, v, is_causal=causal, backend="cpu")

    def both(function, dtype):
        given = [tuple(x.to(dtype) for x in xs) for xs in (leaves, tangents)]
        return [jvp(function, *given)[1], *_second(function, given[0], tangents, cotangent)]

    wide, theirs, actual = both(oracle, torch.float64), both(peer, dtype), both(ours, dtype)
    names = ("jvp", "t_out", "gq", "gk", "gv")
    for name, a, o, p in zip(names, actual, wide, theirs, strict=True):
        assert_accurate(name, a, o, p)


@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_relu(dtype, shape):
    rows, n_in, n_out = shape
    leaves = [
        torch.randn(rows, n_in, dtype=dtype),
        torch.randn(n_out, n_in, dtype=dtype) / n_in**0.5,
        torch.randn(n_out, dtype=dtype),
    ]
    # A sum that is about 0 may pass the ReLU of one side only; its gradient is cleared on all.
    sums = F.linear(*(x.double() for x in leaves))
    cotangent = torch.randn(rows, n_out).masked_fill_(sums.abs() < 0.05, 0.0).to(dtype)
    wide = _gradients(reference.linear_relu, [x.double() for x in leaves], cotangent)
    peer = _gradients(lambda x, w, b: F.relu(F.linear(x, w, b)), leaves, cotangent)
    actual = _gradients(lambda *x: fastattn.linear_relu(*x, backend="cpu"), leaves, cotangent)
    for name, a, o, p in zip(("out", "dx", "dw", "db"), actual, wide, peer, strict=True):
        assert_accurate(name, a, o, p)
