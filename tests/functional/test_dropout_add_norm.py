"""norm(residual + dropout(x)) as a user calls it: values, every derivative, graphs, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

import fastattn
from fastattn import ops, reference
from fastattn.functional import DropoutAddNormFunction
from fastattn.testing import assert_accurate

pytestmark = pytest.mark.native
KINDS = ("layer", "rms")
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def torchs(x, residual, weight, bias, p=0.0, eps=1e-5, kind="layer"):
    """The same by torch's operations, with a dropout of its own."""
    total = F.dropout(x, p) + residual
    shape = x.shape[-1:]
    if kind == "rms":
        out = F.rms_norm(total, shape, weight, eps)
        return out if bias is None else out + bias
    return F.layer_norm(total, shape, weight, bias, eps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_is_torchs_layers(dtype, kind):
    x, residual, weight, bias = draw(2, 5, 7, 24), draw(2, 5, 7, 24), draw(24), draw(24)
    bias = bias if kind == "layer" else None
    tensors = [None if t is None else t.to(dtype) for t in (x, residual, weight, bias)]
    out = fastattn.dropout_add_norm(*tensors, eps=1e-5, kind=kind)
    assert out.dtype == dtype
    wide = [None if t is None else t.double() for t in tensors]
    assert_accurate("out", out, torchs(*wide, kind=kind), torchs(*tensors, kind=kind))


def test_the_epsilon_is_torchs_default():
    x = draw(3, 8) * 1e-3
    torch.testing.assert_close(fastattn.dropout_add_norm(x), nn.LayerNorm(8).double()(x))
    expected = nn.RMSNorm(8).double()(x)
    torch.testing.assert_close(fastattn.dropout_add_norm(x, kind="rms"), expected)


def test_the_sum_is_returned_for_blocks_that_normalise_their_input():
    x, residual = draw(3, 8), draw(3, 8)
    out, total = fastattn.dropout_add_norm(x, residual, prenorm=True)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(out, F.layer_norm(x + residual, (8,)))
    out, total = fastattn.dropout_add_norm(x, prenorm=True)
    assert total is x


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_drops_its_share_and_scales_the_rest():
    x = torch.ones(64, 512)
    _, total = fastattn.dropout_add_norm(x, dropout_p=0.25, prenorm=True)
    assert total.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs((total == 0).float().mean().item() - 0.25) < 0.01
    _, again = fastattn.dropout_add_norm(x, dropout_p=0.25, prenorm=True)
    assert not torch.equal(total, again)
    torch.manual_seed(3)
    _, first = fastattn.dropout_add_norm(x, dropout_p=0.25, prenorm=True)
    torch.manual_seed(3)
    _, second = fastattn.dropout_add_norm(x, dropout_p=0.25, prenorm=True)
    assert torch.equal(first, second)


def test_the_mask_is_the_references():
    x, residual = draw(6, 100), draw(6, 100)
    for backend in ("cpu", "reference"):
        torch.manual_seed(5)
        total = fastattn.dropout_add_norm(
            x, residual, dropout_p=0.4, prenorm=True, backend=backend
        )[1]
        if backend == "cpu":
            kernels = total
    torch.testing.assert_close(kernels, total)


def test_all_is_dropped():
    x, residual = draw(3, 8).requires_grad_(), draw(3, 8)
    x.data[0, 0] = float("nan")
    out, total = fastattn.dropout_add_norm(x, residual, dropout_p=1.0, prenorm=True)
    assert torch.equal(total[1:], residual[1:])
    assert out[0].isnan().all()
    assert not out[1:].isnan().any()
    assert not torch.autograd.grad(out[1:].sum(), x)[0][1:].any()


def test_no_mask_is_saved():
    """The sum and two numbers a row, whatever is dropped."""
    x, residual = (draw(16, 64).float().requires_grad_() for _ in range(2))
    saved: list[int] = []

    def pack(t):
        saved.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fastattn.dropout_add_norm(x, residual, dropout_p=0.1)
    assert sum(saved) == 4 * (16 * 64 + 2 * 16) + 8  # and the seed


# --- derivatives ----------------------------------------------------------------------------------


def fixed(function):
    """The function with the same dropout at each call."""

    def call(*args):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return function(*args)

    return call


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "residual, affine, p, prenorm",
    [*itertools.product([True, False], [True, False], [0, 0.3], [0, 1])],
)
def test_derivatives(residual, affine, p, prenorm, kind, backend):
    x, r, w, b = draw(3, 5), draw(3, 5), draw(5), draw(5)
    inputs = [t.requires_grad_() for t, there in
              ((x, True), (r, residual), (w, affine), (b, affine)) if there]  # fmt: skip

    @fixed
    def function(x, *rest):
        given = iter(rest)
        r = next(given) if residual else None
        w, b = (next(given), next(given)) if affine else (None, None)
        return fastattn.dropout_add_norm(
            x, r, w, b, p, kind=kind, prenorm=bool(prenorm), backend=backend
        )

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(
        function, inputs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


def test_transforms_agree_with_torchs_operations():
    x, residual, weight, bias = draw(4, 6), draw(4, 6), draw(6), draw(6)

    def ours(x, r, w, b):
        return fastattn.dropout_add_norm(x, r, w, b).pow(3).sum()

    def theirs(x, r, w, b):
        # torch.func's second derivative of F.layer_norm by weight and input is not symmetric.
        z = x + r
        normal = (z - z.mean(-1, keepdim=True)) / z.var(-1, False, keepdim=True).add(1e-5).sqrt()
        return (normal * w + b).pow(3).sum()

    every, tensors = (0, 1, 2, 3), (x, residual, weight, bias)
    for mode in (grad, hessian):
        found, expected = (mode(f, argnums=every)(*tensors) for f in (ours, theirs))
        torch.testing.assert_close(found, expected, **CLOSE)
    found, expected = (jvp(f, tensors, tensors) for f in (ours, theirs))
    torch.testing.assert_close(found, expected, **CLOSE)
    mapped = vmap(fastattn.dropout_add_norm, (0, 0, None, None))(x, residual, weight, bias)
    torch.testing.assert_close(mapped, torchs(*tensors), **CLOSE)
    each = vmap(grad(ours, argnums=2), (0, 0, None, None))(x, residual, weight, bias)
    expected = vmap(grad(theirs, argnums=2), (0, 0, None, None))(x, residual, weight, bias)
    torch.testing.assert_close(each, expected, **CLOSE)


def test_vmap_draws_as_it_is_told():
    x = torch.ones(3, 4, 64)
    call = lambda x: fastattn.dropout_add_norm(x, dropout_p=0.5, prenorm=True)[1]  # noqa: E731
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(x)
    same = vmap(call, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    other = vmap(call, randomness="different")(x)
    assert not torch.equal(other[0], other[1])


def test_a_checkpoint_recomputes_the_same_mask():
    x = draw(8, 32).requires_grad_()
    call = lambda x: fastattn.dropout_add_norm(x, x * 0.5, dropout_p=0.3)  # noqa: E731
    torch.manual_seed(0)
    expected = torch.autograd.grad(call(x).pow(3).sum(), x)[0]
    torch.manual_seed(0)
    out = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.pow(3).sum(), x)[0], expected)


def test_only_what_is_needed_is_computed():
    x, residual, weight = draw(4, 8), draw(4, 8), draw(8)
    for n, leaf in enumerate((x, residual, weight)):
        leaves = [t.clone().requires_grad_(m == n) for m, t in enumerate((x, residual, weight))]
        out = fastattn.dropout_add_norm(*leaves)
        expected = torchs(*leaves, None)
        t = draw(4, 8)
        found, wanted = (torch.autograd.grad(o, leaves[n], t)[0] for o in (out, expected))
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert found.shape == leaf.shape


# --- graphs, autocast, modules --------------------------------------------------------------------


def test_compiled():
    x, residual = (torch.randn(4, 16, requires_grad=True) for _ in range(2))
    weight = torch.randn(16, requires_grad=True)
    leaves = (x, residual, weight)

    def function(x, residual, weight):
        return fastattn.dropout_add_norm(x, residual, weight).pow(2).sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, function))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(requires_grad, p):
    x, residual = (torch.randn(4, 16, requires_grad=requires_grad) for _ in range(2))
    weight, seed = torch.randn(16, requires_grad=requires_grad), torch.tensor([7])
    for args in ((x, residual, weight, None), (x, None, None, None)):
        torch.library.opcheck(
            torch.ops.fastattn.dropout_add_norm_forward, (*args, seed, p, 1e-5, False)
        )
    _, total, mean, rstd = ops.dropout_add_norm_forward(
        x.detach(), residual.detach(), None, None, seed, p, 1e-5, False
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastattn.dropout_add_norm_backward,
        (x.detach(), None, total, None, mean, rstd, seed, p, False, [True] * 4),
        test_utils=tests,
    )


def test_a_sum_of_two_dtypes_is_promoted():
    """A linear layer's bfloat16 beside a residual in float32, as under a CPU's autocast."""
    x, residual = draw(4, 16).bfloat16().requires_grad_(), draw(4, 16).float().requires_grad_()
    weight, bias = draw(16).float(), draw(16).float()
    out = fastattn.dropout_add_norm(x, residual, weight, bias)
    expected = torchs(x, residual, weight, bias)
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected)
    t = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(o, (x, residual), t) for o in (out, expected))
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_module(kind):
    theirs = nn.LayerNorm(16) if kind == "layer" else nn.RMSNorm(16)
    ours = fastattn.nn.DropoutAddNorm(16, p=0.1, kind=kind)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(16))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    torch.testing.assert_close(ours.eval()(x, residual), theirs(x + residual))
    assert not torch.allclose(ours.train()(x, residual), theirs(x + residual))
    before = fastattn.nn.DropoutAddNorm(16, kind=kind, prenorm=True, elementwise_affine=False)
    assert torch.equal(before(x, residual)[1], x + residual)
    assert not list(before.parameters())


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": torch.ones(2, 4).long()}, TypeError, "input: expected a floating-point tensor"),
        ({"input": torch.ones(())}, ValueError, "input: expected at least 1 dimension"),
        ({"residual": torch.ones(2, 5)}, ValueError, r"residual: expected input's shape \(2, 4\)"),
        ({"residual": torch.ones(2, 4).long()}, TypeError, "residual: expected a floating-point"),
        ({"weight": torch.ones(5)}, ValueError, r"weight: expected shape \(4,\), got \(5,\)"),
        ({"weight": torch.ones(4).double()}, TypeError, "weight: expected torch.float32, got"),
        ({"bias": torch.ones(1, 4)}, ValueError, r"bias: expected shape \(4,\), got \(1, 4\)"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p: expected a probability in \[0, 1\], got 1.5"),
        ({"eps": float("nan")}, ValueError, "eps: expected a finite number"),
        ({"kind": "batch"}, ValueError, "kind: expected 'layer' or 'rms', got 'batch'"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_input(change, error, message):
    call = {"input": torch.ones(2, 4)} | change
    with pytest.raises(error, match=message):
        fastattn.dropout_add_norm(**call)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4), (0,)])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_zero(shape, kind):
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight = torch.ones(shape[-1], requires_grad=True)
    out = fastattn.dropout_add_norm(x, residual, weight, dropout_p=0.5, kind=kind)
    assert out.shape == shape
    grads = torch.autograd.grad(out.sum(), (x, residual, weight))
    assert [g.shape for g in grads] == [x.shape, x.shape, weight.shape]
    assert not any(g.any() for g in grads)


def test_the_derivative_op_refuses_to_be_differentiated():
    x = torch.randn(2, 4, requires_grad=True)
    _, _, mean, rstd = DropoutAddNormFunction.apply(x, None, None, None, None, 0.0, 1e-5, False)
    args = (x, None, x, None, mean, rstd, None, 0.0, False, [True, False, False, False])
    dx = torch.ops.fastattn.dropout_add_norm_backward(*args)[0]
    with pytest.raises(RuntimeError, match="differentiable any number of times"):
        torch.autograd.grad(dx.sum(), x)


def test_the_reference_formulas_are_autograds():
    x, residual, weight, bias = (
        t.requires_grad_() for t in (draw(3, 6), draw(3, 6), draw(6), draw(6))
    )
    for rms in (False, True):
        seed = torch.tensor([3])
        options = {"dropout_p": 0.3, "rms": rms}
        out, total = reference.dropout_add_norm(x, residual, weight, bias, seed, **options)
        t, u = draw(3, 6), draw(3, 6)
        expected = torch.autograd.grad((out, total), (x, residual, weight, bias), (t, u))
        found = reference.dropout_add_norm_backward(t, u, total, weight, seed, **options)
        torch.testing.assert_close(found, expected, **CLOSE)
        t_out = reference.dropout_add_norm_jvp(total, weight, u, weight, bias, rms=rms)
        function = lambda z, w, b, rms=rms: reference.dropout_add_norm(z, None, w, b, rms=rms)[0]  # noqa: E731
        expected_t = jvp(function, (total, weight, bias), (u, weight, bias))[1]
        torch.testing.assert_close(t_out, expected_t, **CLOSE)
