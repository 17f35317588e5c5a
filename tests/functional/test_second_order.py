"""Every mode of differentiation through the kernels, over the options, against numerical
derivatives and against the reference; vmap against loops."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from derivatives import CLOSE, attention, float64, looped, qkv  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hvp
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import fastattn
from fastattn import ops
from fastattn.functional import AttentionFunction

pytestmark = pytest.mark.native

MASKS = ("none", "causal", "bool", "float", "broadcast float")
EXTRAS = ("plain", "gqa", "dim_v", "dropout", "lse", "window", "softcap", "alibi")


def case(mask: str, extra: str):
    """A function of query, key, value and mask, and its inputs."""
    q = torch.randn(2, 4, 4, 3, requires_grad=True)
    heads_k, dim_v = (2 if extra == "gqa" else 4), (5 if extra == "dim_v" else 3)
    k = torch.randn(2, heads_k, 5, 3, requires_grad=True)
    v = torch.randn(2, heads_k, 5, dim_v, requires_grad=True)
    attn_mask = None
    if mask == "bool":
        attn_mask = torch.rand(2, 1, 4, 5) > 0.3
        attn_mask[:, :, 2] = False  # a row with nothing to attend to
    elif mask == "float":
        attn_mask = torch.randn(2, 4, 4, 5, requires_grad=True)
    elif mask == "broadcast float":
        attn_mask = torch.randn(4, 1, 5, requires_grad=True)
    options = {
        "dropout_p": 0.3 if extra == "dropout" else 0.0,
        "window_size": (2, 1) if extra == "window" else None,
        "softcap": 0.7 if extra == "softcap" else 0.0,
        "alibi_slopes": torch.tensor([0.5, 0.1, 0.2, 0.3]) if extra == "alibi" else None,
        "return_lse": extra == "lse",
    }

    def function(q, k, v, attn_mask):
        torch.manual_seed(7)  # the same dropout mask in every evaluation
        result = attention(is_causal=mask == "causal", enable_gqa=True, **options)(
            q, k, v, attn_mask
        )
        if extra != "lse":
            return result
        return result[0], torch.where(result[1] == -math.inf, 0.0, result[1])

    return function, (q, k, v, attn_mask)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("mask", MASKS)
def test_first_and_second_derivatives(mask, extra):
    function, inputs = case(mask, extra)
    batched = extra != "dropout"  # a random function cannot be mapped by gradcheck
    fast = extra not in ("plain", "lse", "softcap")
    gradcheck(
        function, inputs, fast_mode=fast, check_forward_ad=True, check_batched_grad=batched,
        check_batched_forward_grad=batched,
    )  # fmt: skip
    gradgradcheck(
        function, inputs, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["linear_relu", "mlp"])
def test_linear_layers(name, bias):
    x, w, w2 = (torch.randn(*s, requires_grad=True) for s in ((3, 2, 5), (9, 5), (2, 9)))
    b = torch.randn(9, requires_grad=True) if bias else None
    assert torch.nn.functional.linear(x, w, b).abs().min() > 1e-4  # away from the kink
    functions = {
        "linear_relu": (fastattn.linear_relu, (x, w, b)),
        "mlp": (lambda x, w, b, w2: fastattn.mlp(x, [w, w2], [b, None]), (x, w, b, w2)),
    }
    function, inputs = functions[name]
    gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_an_mlp_in_an_mlp():
    """Weights that come twice, and an input that is made of one of them."""
    x, w, w2 = (torch.randn(*s, requires_grad=True) for s in ((3, 4), (4, 4), (4, 4)))

    def composed(mlp):
        def function(x, w, w2):
            return mlp(mlp(x @ w.T, [w, w]), [w, w2])

        return function

    ours = composed(lambda x, weights: fastattn.mlp(x, weights))
    theirs = composed(lambda x, weights: torch.relu(x @ weights[0].T) @ weights[1].T)
    results = []
    for function in (ours, theirs):
        loss = function(x, w, w2).pow(3).sum()
        grads = torch.autograd.grad(loss, (x, w, w2), create_graph=True)
        results.append((*grads, *torch.autograd.grad(sum(g.sin().sum() for g in grads), (w, w2))))
    torch.testing.assert_close(*results, **CLOSE)


def losses(**options):
    """The same function of query, key and value by the kernels and by the reference."""

    def loss(backend):
        return lambda q, k, v: attention(backend, **options)(q, k, v).pow(3).sum()

    return loss("cpu"), loss("reference")


SECOND = {
    "hessian": hessian,
    "forward over forward": lambda f, **kw: jacfwd(jacfwd(f, **kw), **kw),
    "reverse over reverse": lambda f, **kw: jacrev(jacrev(f, **kw), **kw),
    "reverse over forward": lambda f, **kw: jacrev(jacfwd(f, **kw), **kw),
}


@pytest.mark.parametrize("mode", SECOND.values(), ids=SECOND)
def test_torch_func(mode):
    losses_of_both, every = losses(is_causal=True, softcap=1.3), (0, 1, 2)
    ours, theirs = (mode(loss, argnums=every)(*qkv()) for loss in losses_of_both)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    x, w, b, w2 = torch.randn(3, 5), torch.randn(9, 5), torch.randn(9), torch.randn(2, 9)
    for function, inputs in (
        (lambda be: lambda x, w, b: fastattn.linear_relu(x, w, b, backend=be), (x, w, b)),
        (lambda be: lambda *a: fastattn.mlp(a[0], a[1::2], [a[2], None], backend=be),
         (x, w, b, w2)),
    ):  # fmt: skip
        every = tuple(range(len(inputs)))
        results = []
        for backend in ("cpu", "reference"):
            by_backend = function(backend)

            def loss(*a, f=by_backend):
                return f(*a).pow(3).sum()

            results.append(mode(loss, argnums=every)(*inputs))
        torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("mode", [*SECOND.values(), jacfwd, jacrev], ids=[*SECOND, "f", "r"])
def test_torch_func_of_a_float_mask(mode):
    query, key, value = qkv()
    mask = torch.randn(4, 5)

    def loss(backend):
        return lambda q, m: attention(backend)(q, key, value, m).pow(3).sum()

    results = [mode(loss(backend), argnums=(0, 1))(query, mask) for backend in ("cpu", "reference")]
    torch.testing.assert_close(*results, **CLOSE)
    many = torch.stack([mask, mask.sin()])

    def tangent(m):
        return jvp(lambda m: attention()(query, key, value, m), (m,), (mask,))[1]

    torch.testing.assert_close(vmap(tangent)(many), looped(tangent, (0,), many), **CLOSE)


@pytest.mark.parametrize("modes", itertools.product([jacfwd, jacrev], repeat=3))
def test_third_derivatives(modes):
    query, key, value = qkv()
    q, k, v = query[:1, :2, :2], key[:1, :3, :2], value[:1, :3, :2]
    results = []
    for loss in losses(is_causal=True, softcap=1.3):
        function = lambda q, loss=loss: loss(q, k, v)  # noqa: E731
        for mode in modes:
            function = mode(function)
        results.append(function(q))
    torch.testing.assert_close(*results, **CLOSE)


def test_a_fourth_derivative():
    query, key, value = qkv()
    q, k, v = query[:1, :1, :2], key[:1, :3, :2], value[:1, :3, :2]
    results = []
    for loss in losses():
        function = lambda k, loss=loss: loss(q, k, v)  # noqa: E731
        for mode in (jacrev, jacfwd, jacrev, jacfwd):
            function = mode(function)
        results.append(function(k))
    torch.testing.assert_close(*results, **CLOSE)


def test_autograd_functional():
    inputs = tuple(qkv())
    direction = tuple(map(torch.randn_like, inputs))
    ours, theirs = (hvp(loss, inputs, direction) for loss in losses(is_causal=True))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_third_derivatives_over_several_blocks_of_rows(monkeypatch):
    """Rows, masks and dropout of a block are those of the whole."""
    monkeypatch.setattr("fastattn.functional.higher_order._SCORES", 2 * 4 * 5 * 2)
    function, inputs = case("float", "dropout")

    def third(f):
        (x,) = torch.autograd.grad(f(*inputs).pow(3).sum(), inputs[0], create_graph=True)
        (x,) = torch.autograd.grad(x.sin().sum(), inputs[1], create_graph=True)
        return torch.autograd.grad(x.sin().sum(), inputs)

    def reference(*inputs):
        torch.manual_seed(7)
        return attention("reference", dropout_p=0.3)(*inputs)

    torch.testing.assert_close(third(function), third(reference), **CLOSE)


VARLEN = (torch.tensor([0, 3, 3, 10]), torch.tensor([0, 4, 6, 13]), 7, 7)


def packed(backend: str):
    def function(q, k, v):
        torch.manual_seed(3)
        slopes = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3) * torch.tensor([[1.0], [2.0], [0.5]])
        return fastattn.varlen_attn(
            q, k, v, *VARLEN, is_causal=True, softcap=1.1, alibi_slopes=slopes, backend=backend
        ).pow(3)

    return function


def test_packed_sequences():
    inputs = torch.randn(10, 4, 3), torch.randn(13, 2, 3), torch.randn(13, 2, 5)
    direction = tuple(x.sin() for x in inputs)

    def modes(f):
        def gradient(*x):
            return grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2))(*x)

        def second(*x):
            return jvp(gradient, x, direction)[1]

        return jvp(f, inputs, direction), second(*inputs), jvp(second, inputs, direction)[1]

    torch.testing.assert_close(modes(packed("cpu")), modes(packed("reference")), **CLOSE)
    many = torch.stack([inputs[0], 2 * inputs[0], inputs[0] - 1])

    def gradients(q, k, v):
        return grad(lambda *x: packed("cpu")(*x).sum(), argnums=(0, 1, 2))(q, k, v)

    mapped = vmap(gradients, in_dims=(0, None, None))(many, *inputs[1:])
    looped = [gradients(q, *inputs[1:]) for q in many]
    torch.testing.assert_close(mapped, tuple(map(torch.stack, zip(*looped, strict=True))), **CLOSE)


class TwoBlocks(torch.nn.Module):
    def __init__(self, layer: type) -> None:
        super().__init__()
        options = {"dim_feedforward": 6, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = torch.nn.Sequential(*(layer(4, 2, **options) for _ in range(2)))

    def forward(self, x):
        return self.blocks(x).pow(2).mean()


def test_the_hessian_of_two_blocks_is_the_math_paths():
    ours, torchs = TwoBlocks(fastattn.nn.TransformerEncoderLayer), TwoBlocks(
        torch.nn.TransformerEncoderLayer
    )  # fmt: skip
    ours.load_state_dict(torchs.state_dict())
    x, name = torch.randn(2, 3, 4), "blocks.0.self_attn.in_proj_weight"
    hessians = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for model in (ours, torchs):
            parameters = {n: p.detach() for n, p in model.named_parameters()}

            def loss(w, x=x, model=model, parameters=parameters):
                return functional_call(model, parameters | {name: w}, (x,))

            hessians.append(hessian(loss)(parameters[name]))
    torch.testing.assert_close(*hessians, rtol=1e-8, atol=1e-8)


def test_a_function_by_itself():
    query, key, value = qkv()
    call = ops.Call(ops.Options(is_causal=True, scale=0.5))

    def function(q):
        return AttentionFunction.apply(call, q, key, value, None, *ops.Extras())[0]

    assert vmap(function)(query.expand(3, 2, 4, 3)).shape == (3, 2, 4, 3)
    torch.testing.assert_close(
        jvp(function, (query,), (query,)),
        jvp(
            lambda q: attention("reference", is_causal=True, scale=0.5)(q, key, value),
            (query,),
            (query,),
        ),
        **CLOSE,
    )


def test_no_graph_keeps_itself_alive():
    """What is saved for forward mode holds no output in a cycle."""
    query, key, value = qkv()
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        out = attention()(query.clone().requires_grad_(), key, value)
        seen = weakref.ref(out.grad_fn)
        del out
        assert seen() is None
    finally:
        gc.enable()


def test_sizes_of_zero_of_linear_layers():
    w, b = torch.zeros(4, 0), torch.randn(4)

    def gradient(b):
        return grad(lambda b: fastattn.linear_relu(torch.zeros(3, 0), w, b).sin().sum())(b)

    torch.testing.assert_close(jvp(gradient, (b,), (b,))[1], -3 * b * b.relu().sin())
    empty = vmap(grad(lambda w, x: fastattn.linear_relu(x, w).sum()), (0, 0))(
        torch.zeros(2, 0, 3), torch.zeros(2, 5, 3)
    )
    assert empty.shape == (2, 0, 3)


def test_what_there_is_not_is_refused():
    query, key, value = qkv()
    q = query.clone().requires_grad_()
    slopes = torch.tensor([0.5, 0.25], requires_grad=True)
    call, extras = ops.Call(ops.Options(scale=0.5)), ops.Extras(slopes)
    out = AttentionFunction.apply(call, q, key, value, None, *extras)[0]
    with pytest.raises(RuntimeError, match="alibi_slopes: expected no gradient"):
        out.sum().backward()
    x = attention()(q, key, value)
    for _ in range(2):
        (x,) = torch.autograd.grad(x.pow(3).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="is_grads_batched: expected"):
        torch.autograd.grad(x, q, torch.eye(x.numel()).view(-1, *x.shape), is_grads_batched=True)


def test_bad_tangents_raise():
    query, key, value = qkv()
    slopes = torch.tensor([0.5, 0.25])
    with pytest.raises(RuntimeError, match="alibi_slopes no gradient"):
        jvp(lambda s: attention(alibi_slopes=s)(query, key, value), (slopes,), (slopes,))

    def by_the_function(s):
        call = ops.Call(ops.Options(scale=0.5))
        return AttentionFunction.apply(call, query, key, value, None, *ops.Extras(s))[0]

    with pytest.raises(RuntimeError, match="alibi_slopes: expected no tangent"):
        jvp(by_the_function, (slopes,), (slopes,))
    with pytest.raises((RuntimeError, TypeError), match="t_query: expected Double, got Float"):
        jvp(attention(), (query, key, value), (query.float(), key, value))
    with pytest.raises((RuntimeError, ValueError), match="shape|size"):
        jvp(attention(), (query, key, value), (query[:, :2], key, value))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_second_derivative_is_linear_in_the_sequence():
    """S = 16384, whose scores would take 1 GiB an array, within 300 MB beside inputs and results,
    which are 13 tensors of 4 MB."""
    program = """
import re, torch, fastattn
torch.set_num_threads(2)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
def step(s):
    q, k, v = (torch.randn(1, 1, s, 64, requires_grad=True) for _ in range(3))
    out = fastattn.scaled_dot_product_attention(q, k, v)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    sum(g.square().sum() for g in grads).backward()
step(64)
before = peak()
step(16384)
print((peak() - before) // 1024)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    print("second derivative at S = 16384:", run.stdout.strip(), "MB with inputs and results")
    assert int(run.stdout) < 300 + 13 * 4
