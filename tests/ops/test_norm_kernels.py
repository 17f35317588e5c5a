"""The native dropout_add_norm ops against the oracle in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastattn import ops, reference
from fastattn.reference.norm import keep_factor, norm
from fastattn.testing import assert_accurate, assert_close, unit_roundoff

pytestmark = pytest.mark.native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# weight and bias: absent, of input's dtype, of the accumulator's
VECTORS = [(None, None), ("same", "same"), ("wide", "wide"), ("same", None), ("wide", "same"),
           (None, "wide")]  # fmt: skip
COTANGENTS = [(True, False), (False, True), (True, True)]  # which of grad_out, grad_sum
SHAPES = [(1, 1), (5, 1), (1, 7), (3, 16), (2, 3, 64), (130, 33), (70, 513), (2049, 5), (3, 4099),
          (40, 1024)]  # fmt: skip
EPS = 1e-5


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def vector(kind, n, dtype):
    if kind is None:
        return None
    return torch.randn(n, dtype=dtype if kind == "same" else accumulator(dtype))


def to(dtype, *tensors):
    return [None if x is None else x.to(dtype) for x in tensors]


def torchs_norm(z, weight, bias, rms):
    if not rms:
        return F.layer_norm(z, z.shape[-1:], weight, bias, EPS)
    out = F.rms_norm(z, z.shape[-1:], weight, EPS)
    return out if bias is None else out + bias


class Errors:
    """The errors of a row's statistics, from the number of roundings. Columns are summed 512 at a
    time, in vectors that 40 additions bring together."""

    def __init__(self, z, rms):
        wide = accumulator(z.dtype)
        self.u, self.acc = unit_roundoff(z.dtype), unit_roundoff(wide)
        self.z = z.double()
        self.roundings = 44 + z.shape[-1] / 512
        self.of_mean = 0.0 * self.z[..., :1]
        centred = self.z
        if not rms:
            self.of_mean = self.sum_of(self.z)
            centred = self.z - self.z.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True) + EPS
        self.rstd = variance.rsqrt()
        self.normal = centred * self.rstd
        self.of_rstd = self.roundings * self.acc + self.of_mean.square() / variance  # relative
        self.of_normal = (self.of_rstd + 4 * self.acc) * self.normal.abs()
        self.of_normal = self.of_normal + self.rstd * self.of_mean

    def sum_of(self, x):
        """The error of a mean over columns."""
        return self.roundings * self.acc * x.abs().mean(-1, keepdim=True)

    def of_gradients(self, go, gs, weight, factor, rms):
        z, acc, normal = self.z, self.acc, self.normal
        dy = torch.zeros_like(z) if go is None else go.double()
        g = dy if weight is None else dy * weight.double()
        g_normal = g * normal
        products = g_normal.mean(-1, keepdim=True)
        off = 4 * acc * g.abs() + self.of_normal * products.abs()
        off = off + normal.abs() * (
            self.sum_of(g_normal) + (g.abs() * self.of_normal).mean(-1, keepdim=True)
        )
        size = g.abs() + (normal * products).abs()
        if not rms:
            off = off + self.sum_of(g)
            size = size + g.mean(-1, keepdim=True).abs()
        dz = self.rstd * (off + (self.of_rstd + 4 * acc) * size)
        if gs is not None:
            dz = dz + 2 * acc * gs.double().abs()
        rows = z.reshape(-1, z.shape[-1]).shape[0]
        roundings = (100 + rows / 2048) * acc  # 32 rows, the blocks of a task, 64 tasks
        dy, normal, of_normal = (x.reshape(rows, -1).abs() for x in (dy, normal, self.of_normal))
        dw = (dy * of_normal).sum(0) + roundings * (dy * normal).sum(0)
        return [dz if factor is None else 2 * dz * factor, dz, dw, roundings * dy.sum(0)]


def compare(name, actual, oracle, peer, off):
    """Against the roundings, and against torch, if it has a result, where there are enough numbers
    for its error to be one of many."""
    u = unit_roundoff(actual.dtype)
    if actual.dtype == torch.float64:
        off = 2 * off  # the oracle's are as many
    least = torch.finfo(actual.dtype).smallest_normal
    assert_close(name, actual, oracle, off + u * oracle.abs() + least)
    if peer is not None and actual.dtype != torch.float64 and actual.numel() > 30:
        assert_accurate(name, actual, oracle, peer)


def forward(x, residual, weight, bias, seed, p, rms):
    """The op's results, each of which is compared; with the sum where input is the sum."""
    out, total, mean, rstd = ops.dropout_add_norm_forward(
        x, residual, weight, bias, seed, p, EPS, rms
    )
    z = x
    if residual is None and p == 0.0:
        assert total.shape == (0,)
    else:
        z = total
        factor = keep_factor(x.double(), seed, p)
        kept = x.double() if factor is None else x.double() * factor
        r = torch.zeros_like(kept) if residual is None else residual.double()
        acc = unit_roundoff(accumulator(x.dtype))
        compare("sum", total, kept + r, None, 3 * acc * (kept.abs() + r.abs()))
    wide, errors = accumulator(x.dtype), Errors(z, rms)
    assert out.dtype == total.dtype == x.dtype
    assert mean.dtype == rstd.dtype == wide
    peer = torchs_norm(*to(wide, z, weight, bias), rms).to(x.dtype)
    w, b = to(torch.float64, weight, bias)
    oracle = norm(z.double(), w, b, eps=EPS, rms=rms)
    scale = 1.0 if w is None else w.abs()
    off = scale * (errors.of_normal + 2 * errors.acc * errors.normal.abs())
    compare("out", out, oracle, peer, off + errors.acc * oracle.abs())
    of_rstd = errors.of_rstd * errors.rstd
    assert_close("rstd", rstd, errors.rstd.reshape(-1), 2 * of_rstd.reshape(-1))
    if rms:
        assert mean.shape == (0,)
    else:
        assert_close("mean", mean, z.double().mean(-1).reshape(-1), 2 * errors.of_mean.reshape(-1))
    return z, mean, rstd


def backward(grad_out, grad_sum, z, weight, mean, rstd, seed, p, rms, needs=(True,) * 4):
    grads = ops.dropout_add_norm_backward(
        grad_out, grad_sum, z, weight, mean, rstd, seed, p, rms, needs
    )
    oracle = reference.dropout_add_norm_backward(
        *to(torch.float64, grad_out, grad_sum, z, weight), seed, dropout_p=p, eps=EPS, rms=rms
    )
    wide, n = accumulator(z.dtype), z.shape[-1]
    given = torch.ones(n, dtype=wide) if weight is None else weight.to(wide)
    leaves = [z.to(wide), given, torch.zeros(n, dtype=wide)]
    peer = [torch.zeros_like(x) for x in leaves]
    if grad_out is not None:
        leaves = [x.detach().requires_grad_() for x in leaves]
        peer = torch.autograd.grad(torchs_norm(*leaves, rms), leaves, grad_out.to(wide))
    dz = peer[0] if grad_sum is None else peer[0] + grad_sum
    factor = keep_factor(dz, seed, p)
    peer = [dz if factor is None else dz * factor, dz, *peer[1:]]
    off = Errors(z, rms).of_gradients(grad_out, grad_sum, weight, factor, rms)
    kinds = [z.dtype] * 2 + [z.dtype if weight is None else weight.dtype] * 2
    names = ("grad_input", "grad_residual", "grad_weight", "grad_bias")
    every = zip(names, grads, oracle, peer, off, kinds, needs, strict=True)
    for name, a, o, t, bound, kind, need in every:
        assert a.dtype == kind
        if need:
            compare(name, a, o, t.to(kind), bound)
        else:
            assert a.shape == (0,)
    return grads


def dropped(name, rows):
    return {
        "none": (None, 0.0),
        "one seed": (torch.tensor([2**40 + 7]), 0.3),
        "seeds": (torch.arange(rows) - 1, 0.6),
    }[name]


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dropout", ["none", "one seed", "seeds"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_options(dtype, dropout, rms):
    m, n = 6, 37
    seed, p = dropped(dropout, 3)
    for residual, (w, b) in itertools.product((False, True), VECTORS):
        x = torch.randn(m, n, dtype=dtype)
        r = torch.randn(m, n, dtype=dtype) if residual else None
        weight = vector(w, n, dtype)
        z, *moments = forward(x, r, weight, vector(b, n, dtype), seed, p, rms)
        for of_out, of_sum in COTANGENTS:
            go, gs = (torch.randn(m, n, dtype=dtype) if g else None for g in (of_out, of_sum))
            backward(go, gs, z, weight, *moments, seed, p, rms)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype, shape, rms):
    n, rows = shape[-1], math.prod(shape[:-1])
    x, r, go, gs = (torch.randn(shape, dtype=dtype) for _ in range(4))
    weight, bias = vector("same", n, dtype), vector("same", n, dtype)
    for dropout, residual in itertools.product(("none", "seeds"), (None, r)):
        seed, p = dropped(dropout, rows if rows < 100 else 1)
        z, *moments = forward(x, residual, weight, bias, seed, p, rms)
        backward(go, gs, z, weight, *moments, seed, p, rms)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=4)), ids=str)
def test_what_is_needed(needs):
    x, r, go, gs = (torch.randn(70, 41) for _ in range(4))
    weight = torch.randn(41)
    for dropout, (of_out, of_sum) in itertools.product(("none", "one seed"), COTANGENTS):
        seed, p = dropped(dropout, 1)
        z, *moments = forward(x, r, weight, None, seed, p, False)
        cotangents = go if of_out else None, gs if of_sum else None
        backward(*cotangents, z, weight, *moments, seed, p, False, needs)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_large_mean(dtype, rms):
    x = torch.randn(20, 700, dtype=dtype) + 1e4
    weight, bias, go = torch.randn(700, dtype=dtype), None, torch.randn(20, 700, dtype=dtype)
    z, *moments = forward(x, None, weight, bias, None, 0.0, rms)
    backward(go, None, z, weight, *moments, None, 0.0, rms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sums_of_many_rows(dtype):
    m, n = 20_000, 3
    x, go = torch.randn(m, n, dtype=dtype), torch.rand(m, n, dtype=dtype)
    weight = vector("wide", n, dtype)
    z, *moments = forward(x, None, weight, None, None, 0.0, False)
    backward(go, None, z, weight, *moments, None, 0.0, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_in_its_row(dtype):
    x, r, go = (torch.randn(40, 77, dtype=dtype) for _ in range(3))
    weight, seed = torch.randn(77, dtype=dtype), torch.tensor([1])
    clean = ops.dropout_add_norm_forward(x, r, weight, None, seed, 0.5, EPS, False)
    grads = ops.dropout_add_norm_backward(
        go, None, clean[1], weight, *clean[2:], seed, 0.5, False, [True] * 4
    )
    # One of these two is dropped, and is a NaN nevertheless, as in torch.
    factor = keep_factor(x, seed, 0.5)
    for column in (factor[9].argmin(), factor[9].argmax()):
        y = x.clone()
        y[9, column] = math.nan
        found = ops.dropout_add_norm_forward(y, r, weight, None, seed, 0.5, EPS, False)
        again = ops.dropout_add_norm_backward(
            go, None, found[1], weight, *found[2:], seed, 0.5, False, [True] * 4
        )
        others = torch.arange(40) != 9
        for a, b in zip((*found, *again[:2]), (*clean, *grads[:2]), strict=True):
            assert torch.equal(a[others], b[others])
        assert found[0][9].isnan().all()
        assert found[1][9].isnan().sum() == 1
        assert again[0][9].isnan().all()
        assert again[1][9].isnan().all()


def test_threads_change_nothing():
    x, r, go = (torch.randn(700, 300) for _ in range(3))
    weight, seed = torch.randn(300), torch.arange(7)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = ops.dropout_add_norm_forward(x, r, weight, weight, seed, 0.1, EPS, False)
            grads = ops.dropout_add_norm_backward(
                go, None, found[1], weight, *found[2:], seed, 0.1, False, [True] * 4
            )
            results.append([*found, *grads])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def strided(x):
    """x with other strides: between rows, between columns, both the other way round, shared."""
    yield torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield torch.stack([x, x], -1)[..., 0]
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield x[:1].expand(x.shape)


def test_strides():
    x, r, go, gs = (torch.randn(6, 5, 19, dtype=torch.float32) for _ in range(4))
    weight, bias, seed = torch.randn(19), torch.randn(19), torch.tensor([4, 5, 6])
    every = zip(*map(strided, (x, r, go, gs)), strict=True)
    for x, r, go, gs in every:
        w, b, s = (torch.stack([v, v], -1)[:, 0] for v in (weight, bias, seed))
        found = ops.dropout_add_norm_forward(x, r, w, b, s, 0.4, EPS, False)
        dense = [v.contiguous() for v in (x, r, go, gs)]
        wanted = ops.dropout_add_norm_forward(*dense[:2], weight, bias, seed, 0.4, EPS, False)
        assert all(map(torch.equal, found, wanted))
        z, mean, rstd = (torch.stack([v, v], -1)[..., 0] for v in found[1:])
        found = ops.dropout_add_norm_backward(go, gs, z, w, mean, rstd, s, 0.4, False, [True] * 4)
        wanted = ops.dropout_add_norm_backward(
            *dense[2:], wanted[1], weight, *wanted[2:], seed, 0.4, False, [True] * 4
        )
        assert all(map(torch.equal, found, wanted))


def test_one_dimension_is_one_row():
    x, weight = torch.randn(9), torch.randn(9)
    found = ops.dropout_add_norm_forward(x, None, weight, None, None, 0.0, EPS, True)
    wanted = ops.dropout_add_norm_forward(x[None], None, weight, None, None, 0.0, EPS, True)
    assert torch.equal(found[0], wanted[0][0])
    grads = ops.dropout_add_norm_backward(
        x, None, x, weight, found[2], found[3], None, 0.0, True, [True] * 4
    )
    assert [g.shape for g in grads] == [(9,)] * 4


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0), (2, 0, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_of_zero(dtype, shape):
    x, weight = torch.empty(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    rows = math.prod(shape[:-1])
    for p, rms in itertools.product((0.0, 0.5), (False, True)):
        seed = torch.tensor([3])
        out, total, mean, rstd = ops.dropout_add_norm_forward(
            x, x, weight, weight, seed, p, EPS, rms
        )
        assert out.shape == total.shape == shape
        assert rstd.shape == (rows,)
        assert mean.shape == (0 if rms else rows,)
        assert rstd.isnan().all()  # of rows without a number
        grads = ops.dropout_add_norm_backward(
            x, None, total, weight, mean, rstd, seed, p, rms, [True] * 4
        )
        assert [g.shape for g in grads] == [shape] * 2 + [weight.shape] * 2
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
