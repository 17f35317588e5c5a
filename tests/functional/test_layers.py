"""Linear layers with any activation and dropout, several on one input, stacked and gated, as a user
calls them: values, every derivative, graphs, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from layer_calls import ACTIVATIONS, TORCHS, draw, linear
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

import fastattn
from fastattn.functional import GatedLinearFunction, LinearFunction

pytestmark = pytest.mark.native
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_all_is_dropped(activation):
    x, w = draw(3, 8).requires_grad_(), draw(5, 8)
    x.data[0, 0] = math.nan
    out = fastattn.linear(x, w, None, activation, 1.0)
    assert out[0].isnan().all()
    assert torch.equal(out[1:], torch.zeros(2, 5, dtype=torch.float64))
    assert not torch.autograd.grad(out[1:].sum(), x)[0][1:].any()


@pytest.mark.parametrize(
    "activation, p, slope",
    [(None, 0.0, 0), ("relu", 0.1, 1 / 8), (None, 0.1, 1 / 8), ("gelu", 0.0, 4), ("gelu", 0.1, 4)],
)
def test_what_is_saved(activation, p, slope):
    """Input, weight, and bytes an output element: no dropout mask."""
    x, w, b = draw(16, 64).float(), draw(32, 64).float().requires_grad_(), draw(32).float()
    saved: dict[int, int] = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fastattn.linear(x, w, b, activation, p, backend="cpu")
    extra = 8 * (p > 0) + 4 * b.numel()  # the seed and the bias
    assert sum(saved.values()) == 4 * (16 * 64 + 32 * 64) + slope * 16 * 32 + extra


def test_nothing_is_saved_without_gradients():
    x, w = draw(16, 64), draw(32, 64)
    out, slope = LinearFunction.apply(x, "gelu", 0.0, None, False, 1, w, None)
    assert slope.numel() == 0
    with torch.no_grad():
        assert torch.equal(fastattn.linear(x, w, None, "gelu", backend="cpu"), out)


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "activation, p, bias", [*itertools.product(ACTIVATIONS, [0.0, 0.3], [True, False])]
)
def test_derivatives_of_linear(activation, p, bias, backend):
    inputs = [t.requires_grad_() for t in (draw(3, 5), draw(4, 5), draw(4))][: 2 + bias]

    def function(x, w, b=None):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return fastattn.linear(x, w, b, activation, p, backend=backend)

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(
        function, inputs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


@pytest.mark.parametrize("activation, p", [*itertools.product(ACTIVATIONS, [0.0, 0.3])])
def test_derivatives_of_activation_dropout(activation, p):
    def function(x):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return fastattn.activation_dropout(x, activation, p, backend="cpu")

    x = draw(3, 5).requires_grad_()
    assert gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(
        function, x, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("down", [True, False])
def test_derivatives_of_gated_mlp(activation, down):
    shapes = ((3, 5), (4, 5), (4, 5), (2, 4), (4,), (4,), (2,))
    inputs = [draw(*s).requires_grad_() for s in shapes]
    kept = [n for n in range(7) if down or n not in (3, 6)]

    def function(*given):
        tensors = [None] * 7
        for place, x in zip(kept, given, strict=True):
            tensors[place] = x
        return fastattn.gated_mlp(*tensors, activation=activation, backend="cpu")

    leaves = [inputs[n] for n in kept]
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(
        function, leaves, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_derivatives_of_multi_linear(backend):
    inputs = [draw(*s).requires_grad_() for s in ((3, 5), (4, 5), (11, 5), (2, 5), (4,), (2,))]

    def function(x, q, k, v, b_q, b_v):
        return fastattn.multi_linear(x, [q, k, v], [b_q, None, b_v], backend=backend)

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(
        function, inputs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


@pytest.mark.parametrize("activation, p", [("gelu", 0.0), ("gelu", 0.3), ("relu", 0.3)])
def test_derivatives_of_mlp(activation, p):
    inputs = [draw(*s).requires_grad_() for s in ((3, 5), (6, 5), (4, 6), (2, 4), (6,), (2,))]

    def function(x, w0, w1, w2, b0, b2):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return fastattn.mlp(x, [w0, w1, w2], [b0, None, b2], activation, p)

    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_transforms_agree_with_torchs_operations():
    x, w, b = draw(4, 6), draw(5, 6), draw(5)

    def ours(x, w, b):
        return fastattn.linear(x, w, b, "gelu").pow(3).sum()

    def theirs(x, w, b):
        return F.gelu(F.linear(x, w, b)).pow(3).sum()

    every, tensors = (0, 1, 2), (x, w, b)
    for mode in (grad, hessian):
        found, expected = (mode(f, argnums=every)(*tensors) for f in (ours, theirs))
        torch.testing.assert_close(found, expected, **CLOSE)
    found, expected = (jvp(f, tensors, tensors) for f in (ours, theirs))
    torch.testing.assert_close(found, expected, **CLOSE)
    found, expected = (vmap(grad(f, argnums=1), (0, None, None))(*tensors) for f in (ours, theirs))
    torch.testing.assert_close(found, expected, **CLOSE)
    mapped = vmap(lambda x: fastattn.multi_linear(x, [w, w * 2]))(x)[1]
    torch.testing.assert_close(mapped, F.linear(x, w * 2), **CLOSE)
    gated = vmap(lambda x: fastattn.gated_mlp(x, w, w, None, b))(x)
    torch.testing.assert_close(gated, F.silu(F.linear(x, w, b)) * F.linear(x, w), **CLOSE)


def test_a_gradient_penalty():
    x, w = draw(4, 6).requires_grad_(), draw(5, 6).requires_grad_()
    found = []
    for call in (lambda: linear(x, w, None, "gelu"), lambda: F.gelu(F.linear(x, w))):
        (g,) = torch.autograd.grad(call().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.pow(2).sum(), (x, w)))
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_weights(frozen):
    """Without an activation only the shape of the input is kept for them."""
    x, w = draw(4, 6).requires_grad_(), draw(5, 6).requires_grad_(not frozen)
    scale = draw(5).requires_grad_()
    for again in (False, True):
        found = []
        for call in (
            lambda: fastattn.multi_linear(x, [w, w * 2], backend="cpu")[1],
            lambda: F.linear(x, w * 2),
        ):
            (g,) = torch.autograd.grad((call() * scale).sum(), x, create_graph=again)
            found.append(torch.autograd.grad(g.pow(2).sum(), scale)[0] if again else g)
        torch.testing.assert_close(*found, **CLOSE)


def test_one_tensor_twice():
    """The same tensor as both weights gets both gradients."""
    x, w = draw(3, 4).requires_grad_(), draw(5, 4).requires_grad_()
    t = draw(3, 5)
    for ours, theirs in (
        (sum(fastattn.multi_linear(x, [w, w], backend="cpu")), 2 * F.linear(x, w)),
        (fastattn.gated_mlp(x, w, w, None, backend="cpu"), F.silu(F.linear(x, w)) * F.linear(x, w)),
    ):
        for again in (False, True):
            found, expected = (
                torch.autograd.grad(o, (x, w), t, retain_graph=True, create_graph=again)
                for o in (ours, theirs)
            )
            torch.testing.assert_close(found, expected, **CLOSE)


# --- graphs, autocast -----------------------------------------------------------------------------


def test_compiled():
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((4, 16), (8, 16), (8,)))
    leaves = (x, w, b)

    def function(x, w, b):
        hidden = fastattn.linear(x, w, b, "gelu", backend="cpu")
        q, k = fastattn.multi_linear(hidden, [w[:, :8], w[:, 8:]], backend="cpu")
        return fastattn.gated_mlp(q + k, w[:, :8], w[:, 8:], None, b, backend="cpu").pow(2).sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, function))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("number", range(len(ACTIVATIONS)))
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(requires_grad, number, p):
    x, w = (torch.randn(*s, requires_grad=requires_grad) for s in ((4, 16), (12, 16)))
    b, absent, seed = torch.randn(12), torch.empty(0), torch.tensor([7])
    forward = torch.ops.fastattn.linear_forward
    torch.library.opcheck(forward, (x, [w], [b], [], number, p, seed, True))
    if p == 0.0:
        torch.library.opcheck(forward, (x, [w, w[:5]], [absent, b[:5]], [], number, p, None, True))
        torch.library.opcheck(
            torch.ops.fastattn.gated_linear_forward, (x, w, w, None, b, number, True)
        )
    out, saved = forward(x.detach(), [w.detach()], [b], [], number, p, seed, True)
    torch.library.opcheck(
        torch.ops.fastattn.linear_backward,
        ([out], x.detach(), [w.detach()], [saved], p, [True] * 3),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_ops_differentiate():
    x, w = draw(3, 5).requires_grad_(), draw(4, 5).requires_grad_()
    gelu = ACTIVATIONS.index("gelu")
    for save in (True, False):
        absent = x.new_empty(0)
        out = torch.ops.fastattn.linear_forward(x, [w], [absent], [], gelu, 0.0, None, save)[0]
        found, expected = (
            torch.autograd.grad(o.sum(), (x, w)) for o in (out, F.gelu(F.linear(x, w)))
        )
        torch.testing.assert_close(found, expected, **CLOSE)
    out, saved = LinearFunction.apply(x, "gelu", 0.0, None, True, 1, w, None)
    (dx, *_) = torch.ops.fastattn.linear_backward([out], x, [w], [saved], 0.0, [True] * 3)
    with pytest.raises(RuntimeError, match="differentiable any number of times"):
        torch.autograd.grad(dx.sum(), x)


def test_under_autocast():
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((4, 16), (8, 16), (8,)))
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.linear(x, w, b, "gelu")
        peer = F.gelu(F.linear(x, w, b))
    assert out.dtype == peer.dtype == torch.bfloat16
    torch.testing.assert_close(out, peer, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(out.sum(), (x, w, b))
    assert all(g.dtype == torch.float32 for g in grads)


def test_any_strides():
    x, w = draw(16, 9).T.reshape(3, 3, 16).transpose(0, 1), draw(16, 7).T
    expected = F.gelu(F.linear(x, w))
    torch.testing.assert_close(
        fastattn.linear(x, w, None, "gelu", backend="cpu"), expected, **CLOSE
    )
    up = w.flip(0)
    gated = fastattn.gated_mlp(x, w, up, None, activation="gelu", backend="cpu")
    torch.testing.assert_close(gated, expected * F.linear(x, up), **CLOSE)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": torch.ones(2, 4).long()}, TypeError, "input: expected a floating-point tensor"),
        ({"input": torch.ones(())}, ValueError, "input: expected at least 1 dimension"),
        ({"weight": torch.ones(3, 5)}, ValueError, r"weight: expected in_features 4, got \(3, 5\)"),
        ({"weight": torch.ones(3)}, ValueError, "weight: expected 2 dimensions"),
        ({"weight": torch.ones(3, 4).double()}, TypeError, "weight: expected"),
        ({"bias": torch.ones(5)}, ValueError, r"bias: expected shape \(3,\), got \(5,\)"),
        ({"activation": "elu"}, ValueError, "activation: expected one of None, 'relu', 'gelu', "),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p: expected a probability in \[0, 1\]"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot serve activation_dropout"),
    ],
)
def test_bad_input(change, error, message):
    call = {"input": torch.ones(2, 4), "weight": torch.ones(3, 4), "activation": "gelu"} | change
    with pytest.raises(error, match=message):
        fastattn.linear(**call)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, w: fastattn.multi_linear(x, []), ValueError, "weights: expected at least 1"),
        (lambda x, w: fastattn.multi_linear(x, [w], []), ValueError, "biases: expected 1 entries"),
        (lambda x, w: fastattn.multi_linear(x, [w, w.T]), ValueError, "weight 1: expected in_feat"),
        (lambda x, w: fastattn.gated_mlp(x, w, w[:2], w), ValueError, "up_weight: expected gate_w"),
        (lambda x, w: fastattn.gated_mlp(x, w.T, w, w), ValueError, "gate_weight: expected in_fea"),
        (
            lambda x, w: fastattn.gated_mlp(x, w, w, None, backend="triton"),
            RuntimeError,
            "'triton'",
        ),
        (lambda x, w: fastattn.multi_linear(x, [w], backend="triton"), RuntimeError, "'triton'"),
        (lambda x, w: fastattn.gated_mlp(x, w, w, w), ValueError, "down_weight: expected in_feat"),
        (
            lambda x, w: fastattn.gated_mlp(x, w, w, None, w),
            ValueError,
            "gate_bias: expected shape",
        ),
        (
            lambda x, w: fastattn.gated_mlp(x, w, w, w.T, activation="no"),
            ValueError,
            "activation: ",
        ),
        (
            lambda x, w: fastattn.mlp(x, [w, w], None, "gelu"),
            ValueError,
            "weight: expected in_feat",
        ),
        (lambda x, w: fastattn.mlp(x, [w], None, "no"), ValueError, "activation: expected one of"),
        (lambda x, w: fastattn.mlp(x, [w], None, "gelu", 2.0), ValueError, "dropout_p: expected"),
    ],
)
def test_bad_layers(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 4), torch.ones(3, 4))


@pytest.mark.parametrize("rows, n_out, n_in", [*itertools.product([0, 3], [0, 5], [0, 4])])
@pytest.mark.parametrize("activation", [None, "gelu", "relu2"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_sizes_of_zero(rows, n_out, n_in, activation, p):
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((rows, n_in), (n_out, n_in), (n_out,)))
    call = [fastattn.linear(x, w, b, activation, p, backend="cpu")]
    call += fastattn.multi_linear(x, [w, w], [b, b], backend="cpu")
    call.append(fastattn.gated_mlp(x, w, w, None, b, b, activation=activation, backend="cpu"))
    for out in call:
        assert out.shape == (rows, n_out)
        grads = torch.autograd.grad(out.sum(), (x, w, b), retain_graph=True)
        assert [g.shape for g in grads] == [x.shape, w.shape, b.shape]
        assert not any(g.isnan().any() for g in grads)
    out = fastattn.linear(x, w, b, activation, backend="cpu")
    torch.testing.assert_close(out, TORCHS[activation](b).expand(rows, n_out) if n_in == 0 else out)


def test_the_functions_are_exported():
    out, *saved = GatedLinearFunction.apply(*torch.ones(3, 4, 4), None, None, "relu", True)
    assert [t.shape for t in (out, *saved)] == [(4, 4)] * 3
