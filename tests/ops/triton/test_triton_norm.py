"""The Triton kernels of dropout_add_norm against the oracle in float64."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from pairs import every_pair

from fastattn import ops
from fastattn.ops.triton import config
from fastattn.reference import norm as reference
from fastattn.testing import assert_accurate, assert_close

pytestmark = pytest.mark.triton

EPS = 1e-5
VECTOR = (None, "input's", "wide")  # the dtype of weight and bias
OPTIONS = {
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "shape": ((5,), (6, 1), (2, 3, 17), (12, 64), (7, 301), (3, 515)),
    "blocks": ("whole rows", "several"),
    "rms": (False, True),
    "residual": (False, True),
    "weight": VECTOR,
    "bias": VECTOR,
    "seeds": (0, 1, 3),
    "cotangents": ("both", "out", "sum"),
}


def option_pairs() -> list[tuple]:
    """Cases that have every pair of options."""
    cases, seen, chosen = list(itertools.product(*OPTIONS.values())), set(), []
    random.Random(0).shuffle(cases)
    for wanted in (12, 4, 1):  # pairs that a case adds
        for case in cases:
            pairs = set(itertools.combinations(enumerate(case), 2))
            if len(pairs - seen) >= wanted:
                seen |= pairs
                chosen.append(case)
    return chosen


@pytest.fixture
def narrow(monkeypatch):
    """No block holds a whole row, as beyond config.norm's limit."""
    monkeypatch.setattr(config, "norm", lambda *_: None)
    monkeypatch.setattr(config, "WIDE_NORM", config.Block(4, 128, 4))
    monkeypatch.setattr(config, "NORM_COLUMN_SUMS", config.Block(8, 64, 4))
    monkeypatch.setattr(config, "NORM_SHARES", config.Block(4, 16, 4))


@pytest.fixture(params=["whole rows", "several"])
def blocks(request):
    if request.param == "several":
        request.getfixturevalue("narrow")


def double(x):
    return None if x is None else x.double()


def vector(kind, n, dtype, device):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if kind is None:
        return None
    return torch.randn(2 * n, dtype=wide if kind == "wide" else dtype, device=device)[::2]


def rows(shape, dtype, device):
    """Rows that lie apart."""
    return torch.randn(*shape[:-1], shape[-1] + 3, dtype=dtype, device=device)[..., 2:-1]


def columns(shape, dtype, device):
    """Of a last stride above 1."""
    return torch.randn(*shape, 2, dtype=dtype, device=device)[..., 0]


def check_backward(given, z, weight, mean, rstd, seed, p, rms, needs=(True,) * 4):
    """Against float64, with the reference in the op's dtype as the peer; returns the gradients."""
    grads = ops.dropout_add_norm_backward(
        *given, z, weight, mean, rstd, seed, p, rms, needs, "triton"
    )
    more = dict(dropout_p=p, eps=EPS, rms=rms)
    wide = [double(x) for x in (*given, z, weight)]
    oracle = reference.dropout_add_norm_backward(*wide, seed, **more)
    peer = reference.dropout_add_norm_backward(*given, z, weight, seed, **more)
    of_weight = z.dtype if weight is None else weight.dtype
    kinds = (z.dtype, z.dtype, of_weight, of_weight)
    for name, need, kind, a, o, e in zip(
        ("dx", "dr", "dw", "db"), needs, kinds, grads, oracle, peer, strict=True
    ):
        assert a.dtype == kind
        if need:
            assert_accurate(name, a, o, e.to(kind))
        else:
            assert a.shape == (0,)
    return grads


@pytest.mark.parametrize(",".join(OPTIONS), option_pairs())
def test_every_pair_of_options(
    dtype, shape, blocks, rms, residual, weight, bias, seeds, cotangents, device, request
):
    if blocks == "several":
        request.getfixturevalue("narrow")
    m, n, p = math.prod(shape[:-1]), shape[-1], 0.3 if seeds else 0.0
    x, r = rows(shape, dtype, device), columns(shape, dtype, device) if residual else None
    w, b = vector(weight, n, dtype, device), vector(bias, n, dtype, device)
    seeds = seeds if seeds and m % seeds == 0 else 1
    seed = torch.randint(-(2**62), 2**62, (seeds,), device=device)
    out, total, mean, rstd = ops.dropout_add_norm_forward(x, r, w, b, seed, p, EPS, rms, "triton")

    if r is None and p == 0:
        assert total.shape == (0,)
        total = x
    else:
        factor = reference.keep_factor(x.double(), seed, p)
        terms = [x.double() if factor is None else x.double() * factor]
        terms += [] if r is None else [r.double()]
        size = sum(term.abs() for term in terms)
        # Triton's interpreter rounds bfloat16 towards 0.
        assert_close("sum", total, sum(terms), torch.finfo(dtype).eps * size)
    z = total.double().reshape(m, n)
    unit = torch.finfo(mean.dtype).eps
    centred = z if rms else z - z.mean(1, keepdim=True)
    if rms:
        assert mean.shape == (0,)
    else:
        assert_close("mean", mean, z.mean(1), 4 * unit * (1 + z.abs().amax(1)))
    assert mean.dtype == rstd.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.rsqrt((centred * centred).mean(1) + EPS)
    assert_close("rstd", rstd, expected, 16 * unit * expected)
    oracle = reference.norm(total.double(), double(w), double(b), eps=EPS, rms=rms)
    assert_accurate("out", out, oracle, reference.norm(total, w, b, eps=EPS, rms=rms))

    # One is expanded, as a sum's gradient is.
    given = [columns(shape, dtype, device), rows((n,), dtype, device).expand(shape)]
    if cotangents != "both":
        given[cotangents == "out"] = None
    check_backward(given, total, w, mean, rstd, seed, p, rms)


@pytest.mark.parametrize("programs", [1, 60])
@pytest.mark.parametrize("m, n", [(70, 40), (20, 150)])
def test_many_rows(m, n, programs, blocks, device, monkeypatch):
    """Of which a program takes many, or few so that many programs do."""
    monkeypatch.setattr(config, "WANTED_PROGRAMS", programs)
    x, dy = (torch.randn(m, n, device=device) for _ in range(2))
    w, seed = torch.randn(n, device=device), torch.randint(2**62, (m // 10,), device=device)
    _, z, *statistics = ops.dropout_add_norm_forward(
        x, None, w, None, seed, 0.2, EPS, False, "triton"
    )
    grads = [check_backward((dy, None), z, w, *statistics, seed, 0.2, False) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "needs, rms, blocks",
    every_pair(
        [*itertools.product([False, True], repeat=4)], [False, True], ["whole rows", "several"]
    ),
    indirect=["blocks"],
)
def test_needs(needs, rms, blocks, device):
    dy, dsum, z = (torch.randn(9, 70, device=device) for _ in range(3))
    w, b = torch.randn(70, device=device), torch.randn(70, device=device)
    seed = torch.randint(2**62, (3,), device=device)
    statistics = ops.dropout_add_norm_forward(z, None, w, b, None, 0.0, EPS, rms, "triton")[2:]
    check_backward((dy, dsum), z, w, *statistics, seed, 0.5, rms, needs)


def test_the_cotangent_of_the_sum_alone_is_passed_on(device):
    z, dsum = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device)
    z[1, 2] = math.nan  # the norm, which nobody asked for
    given = (None, dsum, z, None, torch.zeros(4, device=device), torch.ones(4, device=device))
    dx, dr, dw, db = ops.dropout_add_norm_backward(
        *given, None, 0.0, False, [True] * 4, "triton"
    )  # fmt: skip
    assert torch.equal(dx, dsum)
    assert torch.equal(dr, dsum)
    assert not dw.any()
    assert not db.any()


@pytest.mark.parametrize("rms", [False, True])
def test_a_nan_stays_in_its_row(rms, blocks, device):
    x, seed = torch.randn(11, 37, device=device), torch.tensor([7], device=device)
    keep = reference.keep_factor(x, seed, 0.5) != 0
    kept, dropped = (int(mask[row].nonzero()[0]) for mask, row in ((keep, 3), (~keep, 8)))
    x[3, kept], x[8, dropped] = math.inf, math.nan  # 0 * NaN is NaN
    out, z, mean, rstd = ops.dropout_add_norm_forward(
        x, None, None, None, seed, 0.5, EPS, rms, "triton"
    )
    bad = torch.zeros(11, dtype=torch.bool, device=device)
    bad[3] = bad[8] = True
    assert torch.equal(out.isnan().any(1), bad)
    assert z[8, dropped].isnan()
    dx, dr, dw, _ = ops.dropout_add_norm_backward(
        out.nan_to_num(), None, z, None, mean, rstd, seed, 0.5, rms, [True] * 4, "triton"
    )
    for grad in (dx, dr):
        assert torch.equal(grad.isnan().any(1), bad)
    assert dw.isnan().any()


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("n", [50, 1000, 2049])
def test_a_large_mean(n, rms, blocks, device):
    x, w = 1e4 + torch.randn(6, n, device=device), torch.ones(n, device=device)
    out, _, *statistics = ops.dropout_add_norm_forward(
        x, None, w, None, None, 0.0, EPS, rms, "triton"
    )
    oracle = reference.norm(x.double(), None, None, eps=EPS, rms=rms)
    peer = (F.rms_norm if rms else F.layer_norm)(x, (n,), eps=EPS)
    assert_accurate("out", out, oracle, peer)
    check_backward((torch.randn_like(x), None), x, w, *statistics, None, 0.0, rms)


def test_equal_elements_have_no_deviation(blocks, device):
    x = torch.tensor([0.1, 1e6 / 3, -3e10], device=device)[:, None].expand(3, 777)
    out, _, mean, rstd = ops.dropout_add_norm_forward(
        x, None, None, None, None, 0.0, EPS, False, "triton"
    )
    assert not out.any()
    assert torch.equal(mean, x[:, 0])
    assert_close("rstd", rstd, torch.full_like(rstd, EPS**-0.5), 1e-4)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (0,)], ids=str)
def test_nothing(shape, blocks, device):
    x, n = torch.randn(shape, device=device), shape[-1]
    w = torch.randn(n, device=device)
    seed = torch.tensor([1], device=device)
    out, total, mean, rstd = ops.dropout_add_norm_forward(
        x, x, w, w, seed, 0.5, EPS, False, "triton"
    )
    assert out.shape == total.shape == shape
    assert mean.shape == rstd.shape == (math.prod(shape[:-1]),)
    dx, dr, dw, db = ops.dropout_add_norm_backward(
        x, None, total, w, mean, rstd, seed, 0.5, False, [True] * 4, "triton"
    )
    assert dx.shape == dr.shape == shape
    assert dw.shape == db.shape == (n,)
    assert not dw.any()
    assert not db.any()


def test_the_fakes_know_the_results(device):
    x, w = torch.randn(2, 3, 8, dtype=torch.float16, device=device), torch.randn(8, device=device)
    seed = torch.tensor([1], device=device)
    forward = torch.ops.fastattn_triton.dropout_add_norm_forward.default
    backward = torch.ops.fastattn_triton.dropout_add_norm_backward.default
    for r, p, rms in ((None, 0.0, True), (x, 0.0, False), (None, 0.5, True)):
        args = (x, r, w, None, seed, p, EPS, rms)
        torch.library.opcheck(forward, args, test_utils=("test_schema", "test_faketensor"))
        mean, rstd = forward(*args)[2:]
        args = (x, None, x, w, mean, rstd, seed, p, rms, [True, False, True, False])
        torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))


FORWARD = dict(
    input=torch.zeros(4, 6), residual=None, weight=torch.zeros(6), bias=torch.zeros(6),
    seed=torch.zeros(2, dtype=torch.int64), dropout_p=0.5, eps=EPS, rms=False,
)  # fmt: skip
BACKWARD = dict(
    grad_out=torch.zeros(4, 6), grad_sum=None, sum=torch.zeros(4, 6), weight=torch.zeros(6),
    mean=torch.zeros(4), rstd=torch.zeros(4), seed=torch.zeros(2, dtype=torch.int64),
    dropout_p=0.5, rms=False, needs=[True] * 4,
)  # fmt: skip


@pytest.mark.parametrize(
    "name, change",
    [
        ("input", torch.zeros(())),
        ("input", torch.zeros(4, 6, dtype=torch.int32)),
        ("residual", torch.zeros(6)),
        ("residual", torch.zeros(4, 6).half()),
        ("weight", torch.zeros(5)),
        ("weight", torch.zeros(6).bfloat16()),
        ("bias", torch.zeros(6, 1)),
        ("bias", torch.zeros(6).double()),
        ("bias", torch.zeros(6, device="meta")),
        ("seed", None),
        ("seed", torch.zeros(3, dtype=torch.int64)),
        ("seed", torch.zeros(0, dtype=torch.int64)),
        ("seed", torch.zeros(2, dtype=torch.int32)),
        ("dropout_p", 1.0),
        ("dropout_p", math.nan),
    ],
)
def test_a_forward_with_bad_metadata_raises(name, change, device):
    raises("dropout_add_norm_forward", FORWARD, name, change, device)


@pytest.mark.parametrize(
    "name, change",
    [
        ("grad_out", None),
        ("grad_out", torch.zeros(4, 5)),
        ("grad_sum", torch.zeros(4, 6).double()),
        ("sum", torch.zeros(4, 6, dtype=torch.int64)),
        ("weight", torch.zeros(6).half()),
        ("mean", torch.zeros(0)),
        ("rstd", torch.zeros(4).double()),
        ("seed", None),
        ("dropout_p", -0.1),
    ],
)
def test_a_backward_with_bad_metadata_raises(name, change, device):
    raises("dropout_add_norm_backward", BACKWARD, name, change, device)


def raises(op, good, name, change, device):
    from fastattn.ops.triton import norm

    def place(x):
        there = isinstance(x, torch.Tensor) and x.device.type == "cpu"
        return x.to(device) if there else x

    call = {key: place(x) for key, x in (good | {name: change}).items()}
    with pytest.raises(RuntimeError, match=f"{op}: {name}: expected .*, got"):
        getattr(norm, op)(**call)
