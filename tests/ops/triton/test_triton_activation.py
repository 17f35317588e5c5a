"""The Triton kernel of an activation with dropout against the oracle in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from pairs import every_pair
from torch.autograd import gradcheck, gradgradcheck

import fastattn
from fastattn import ops, reference
from fastattn.ops.triton import activation as triton_activation
from fastattn.testing import assert_accurate, assert_close

pytestmark = pytest.mark.triton

ACTIVATIONS = ops.ACTIVATIONS
SLOPED = tuple(a for a in ACTIVATIONS if a not in (None, "relu"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((5,), (6, 1), (2, 3, 17), (12, 64), (3, 515), (3, 2, 1030))


def cubic(z):
    """What gelu_tanh gives to the logistic function."""
    return 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)


# Torch's own formulas lose the digits of the tails.
EXACT = {
    "gelu": lambda z: z * torch.special.log_ndtr(z).exp(),
    "gelu_tanh": lambda z: z * F.logsigmoid(cubic(z)).exp(),
    "silu": lambda z: z * F.logsigmoid(z).exp(),
    "quick_gelu": lambda z: z * F.logsigmoid(1.702 * z).exp(),
}


def lay(kind: str, shape, dtype, device):
    """Random numbers in memory as the kind says: whole, in rows that lie apart, in columns that
    do, or expanded from a row."""
    if kind == "rows":
        return torch.randn(*shape[:-1], shape[-1] + 3, dtype=dtype, device=device)[..., 2:-1]
    if kind == "columns":
        return torch.randn(*shape, 2, dtype=dtype, device=device)[..., 0]
    if kind == "expanded":
        return torch.randn(shape[-1], dtype=dtype, device=device).expand(shape)
    return torch.randn(shape, dtype=dtype, device=device)


def seeds(count: int, device) -> torch.Tensor | None:
    return torch.randint(-(2**62), 2**62, (count,), device=device) if count else None


def forward_and_backward(dy, x, activation, p, seed):
    """By the kernel."""
    out = ops.activation_forward(x, activation, p, seed, "triton")
    return out, ops.activation_backward(dy, x, activation, p, seed, "triton")


def by_torch(dy, x, activation, p, seed):
    x = x.detach().clone().requires_grad_()
    out = reference.activation_dropout(x, activation=activation, dropout_p=p, seed=seed)
    return out.detach(), torch.autograd.grad(out, x, dy)[0]


def check(dy, x, activation, p, seed):
    """The results against float64, with torch's in the same dtype as the peer."""
    results = forward_and_backward(dy, x, activation, p, seed)
    oracles = by_torch(dy.double(), x.double(), activation, p, seed)
    peers = by_torch(dy, x, activation, p, seed)
    for name, actual, oracle, peer in zip(("y", "dx"), results, oracles, peers, strict=True):
        assert actual.is_contiguous()
        if x.dtype == torch.float64:  # the oracle is no more exact
            torch.testing.assert_close(actual, oracle, rtol=1e-14, atol=1e-14)
        else:
            assert_accurate(name, actual, oracle, peer)
    return results


@pytest.mark.parametrize(
    "activation, dtype, shape, count, of_x, of_dy",
    every_pair(
        ACTIVATIONS, DTYPES, SHAPES, (0, 1, 3),
        ("whole", "rows", "columns"), ("whole", "columns", "expanded"),
    ),
)  # fmt: skip
def test_every_pair_of_options(activation, dtype, shape, count, of_x, of_dy, device):
    """``count`` is how many seeds there are, 0 for no dropout."""
    m, p = math.prod(shape[:-1]), 0.3 if count else 0.0
    seed = seeds(count if count and m % count == 0 else min(count, 1), device)
    x, dy = lay(of_x, shape, dtype, device), lay(of_dy, shape, dtype, device)
    out, dx = check(dy, x, activation, p, seed)
    if count and activation is None:
        # A dropped element is 0 and no other: random numbers are not.
        kept = reference.keep_factor(x, seed, p) != 0
        assert torch.equal(out != 0, kept & (x != 0))
        assert torch.equal(dx != 0, kept & (dy != 0))


@pytest.mark.parametrize("p", [0.001, 0.3, 0.999])
def test_the_mask_is_the_references(p, device):
    """Of ones every element shows whether it was kept; the seeds are those at 32-bit borders."""
    seed = torch.tensor([0, -1, 2**31, 2**32, -(2**63), 2**63 - 1], device=device)
    one = torch.ones(6, 5, 515, device=device)
    expected = reference.keep_factor(one.double(), seed, p).to(one.dtype)
    for result in forward_and_backward(one, one, None, p, seed):
        torch.testing.assert_close(result, expected, rtol=2**-23, atol=0)
        assert torch.equal(result != 0, expected != 0)
    assert abs((expected == 0).double().mean() - p) < 0.02


# --- numbers out of the common range ------------------------------------------------------------


def exponent(activation, z):
    """The size of the exponent in f's tail: a rounding of it is so many roundings of f."""
    sizes = {
        "gelu": z * z / 2, "gelu_tanh": -cubic(z), "silu": -z, "quick_gelu": -1.702 * z,
        "relu2": 0 * z,
    }  # fmt: skip
    return torch.where(z < 0, sizes[activation], 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", SLOPED)
def test_far_from_zero(activation, dtype, device):
    """Each element by itself, in relative digits, where exponentials over- and underflow. Torch's
    own error counts at each: both lose the digits of gelu's tail."""
    z = torch.tensor([-1e30, -200, -90, -30, -14, -13, -9, -5, -1e-30, -0.0, 0.0, 1e-30, 5, 9, 14,
                      90, 200, 1e15], dtype=dtype, device=device)  # fmt: skip
    one, unit = torch.ones_like(z), torch.finfo(dtype).eps / 2
    results = forward_and_backward(one, z, activation, 0.0, None)
    peers = by_torch(one, z, activation, 0.0, None)
    wide = z.double().requires_grad_()
    exact = EXACT.get(activation, reference.activation(activation))(wide)
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    # Beyond this exponent a result is 0 or below the smallest normal number.
    last = -math.log(torch.finfo(dtype).tiny)
    digits = 8 + 4 * exponent(activation, z.double()).clamp(max=last)
    smallest = torch.finfo(dtype).tiny * z.double().abs().clamp(min=1)
    for name, actual, oracle, peer in zip(
        ("y", "dx"), results, (exact.detach(), slope.nan_to_num(0.0)), peers, strict=True
    ):
        off = (peer.double() - oracle).abs().nan_to_num(0.0)
        assert_close(name, actual, oracle, 2 * off + digits * unit * oracle.abs() + smallest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite(activation, dtype, device):
    """A NaN stays one, dropped or not, and so does one that torch makes of an infinity."""
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=dtype, device=device).repeat(4)
    one = torch.ones_like(x)
    for seed, p in ((None, 0.0), (torch.tensor([5], device=device), 0.5)):
        out, dx = forward_and_backward(one, x, activation, p, seed)
        expected, of_x = by_torch(one.double(), x.double(), activation, p, seed)
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=0, equal_nan=True)
        assert dx[x.isnan()].isnan().all() or activation in (None, "relu")
        finite = of_x.isfinite()
        torch.testing.assert_close(dx.double()[finite], of_x[finite], rtol=1e-2, atol=0)
        of_nan = ops.activation_backward(one * math.nan, x, activation, p, seed, "triton")
        assert of_nan.isnan().all()


# --- sizes of 0, the op's metadata ----------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (0,)], ids=str)
def test_nothing(shape, p, device):
    x = torch.randn(shape, device=device)
    for result in forward_and_backward(x, x, "gelu", p, seeds(1, device)):
        assert result.shape == shape
        assert result.dtype == x.dtype


def test_the_gradient_without_an_activation_reads_no_input(device):
    x = torch.zeros((), device=device).expand(3, 4)
    dy = torch.randn(3, 4, device=device)
    assert torch.equal(ops.activation_backward(dy, x, None, 0.0, None, "triton"), dy)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 8)])
def test_the_fakes_know_the_results(shape, device):
    x = torch.randn(shape, dtype=torch.float16, device=device)
    tests = ("test_schema", "test_faketensor")
    for number, p in ((0, 0.5), (2, 0.0), (2, 0.5)):
        args = (x, number, p, seeds(1, device))
        torch.library.opcheck(
            torch.ops.fastattn_triton.activation_forward.default, args, test_utils=tests
        )
        torch.library.opcheck(
            torch.ops.fastattn_triton.activation_backward.default, (x, *args), test_utils=tests
        )


GOOD = dict(
    grad_out=torch.zeros(4, 6), input=torch.zeros(4, 6), activation=2, dropout_p=0.5,
    seed=torch.zeros(2, dtype=torch.int64),
)  # fmt: skip


@pytest.mark.parametrize(
    "name, change, expected",
    [
        ("grad_out", torch.zeros(4, 5), r"shape \(4, 6\), got \(4, 5\)"),
        ("grad_out", torch.zeros(6), r"shape \(4, 6\), got \(6,\)"),
        ("grad_out", torch.zeros(4, 6).half(), "torch.float32, got torch.float16"),
        ("grad_out", torch.zeros(4, 6, device="meta"), "device .*, got meta"),
        ("input", torch.zeros(()), r"at least 1 dimension \[\*, N\], got \(\)"),
        ("input", torch.zeros(4, 6, dtype=torch.int32), "float32, .*, got torch.int32"),
        ("input", torch.zeros(4, 6, dtype=torch.complex64), "float32, .*, got torch.complex64"),
        ("activation", 7, "a number below 7, got 7"),
        ("activation", -1, "a number below 7, got -1"),
        ("seed", None, r"int64 \[n\] .* a divisor of the 4 rows, got None"),
        ("seed", torch.zeros(3, dtype=torch.int64), r"int64 \[n\] .* of the 4 rows, got .*int64"),
        ("seed", torch.zeros(0, dtype=torch.int64), r"int64 \[n\] on .*, got .*int64"),
        ("seed", torch.zeros(2, 1, dtype=torch.int64), r"int64 \[n\] on .*, got .*int64"),
        ("seed", torch.zeros(2, dtype=torch.int32), "int64 .*, got .*int32"),
        ("dropout_p", 1.0, r"a probability in \[0, 1\), got 1.0"),
        ("dropout_p", -0.1, r"a probability in \[0, 1\), got -0.1"),
        ("dropout_p", math.nan, r"a probability in \[0, 1\), got nan"),
    ],
)
def test_bad_metadata_raises(name, change, expected, device):
    def place(x):
        there = isinstance(x, torch.Tensor) and x.device.type == "cpu"
        return x.to(device) if there else x

    call = {key: place(x) for key, x in (GOOD | {name: change}).items()}
    with pytest.raises(RuntimeError, match=f"activation_backward: {name}: expected {expected}"):
        triton_activation.activation_backward(**call)
    del call["grad_out"]
    if name != "grad_out":
        with pytest.raises(RuntimeError, match=f"activation_forward: {name}: expected {expected}"):
            triton_activation.activation_forward(**call)


# --- the user's functions -------------------------------------------------------------------------


def seeded(function, *args):
    """The function's result, and the seed that it drew."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        out = function(*args, backend="triton")
        torch.manual_seed(11)
        return out, torch.randint(0, 2**63 - 1, (1,), device=out.device)


@pytest.fixture
def kernel_calls(monkeypatch) -> list:
    """The kernel that each launch started."""
    started, launch = [], triton_activation.launch

    def record(kernel, *args, **options):
        started.append(kernel)
        launch(kernel, *args, **options)

    monkeypatch.setattr(triton_activation, "launch", record)
    return started


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_is_torchs_product_and_the_kernel(activation, p, device, kernel_calls):
    shapes = ((4, 3, 9), (70, 9), (70,))
    leaves = [torch.randn(s, dtype=torch.float64, device=device).requires_grad_() for s in shapes]
    out, seed = seeded(fastattn.linear, *leaves, activation, p)
    z = F.linear(*leaves)
    expected = reference.activation_dropout(z, activation=activation, dropout_p=p, seed=seed)
    found, wanted = (torch.autograd.grad(o, leaves, torch.ones_like(o)) for o in (out, expected))
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    # A plain product has nothing behind it, and a ReLU without dropout has its own kernels.
    assert len(kernel_calls) == (2 if p or activation not in (None, "relu") else 0)


@pytest.mark.parametrize("activation, p", itertools.product(["gelu", "relu2"], [0.0, 0.3]))
def test_derivatives_of_activation_dropout(activation, p, device, kernel_calls):
    def function(x):
        return seeded(fastattn.activation_dropout, x, activation, p)[0]

    x = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(function, x)
    assert gradgradcheck(function, x)
    assert kernel_calls


def test_activation_dropout_of_one_dimension(device, kernel_calls):
    x = torch.randn(1200, device=device)[::2].requires_grad_()
    out, seed = seeded(fastattn.activation_dropout, x, "silu", 0.5)
    expected = reference.activation_dropout(x, activation="silu", dropout_p=0.5, seed=seed)
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad(o.sum(), x)[0] for o in (out, expected))
    torch.testing.assert_close(found, wanted)
    assert len(kernel_calls) == 2
