"""The CUDA kernels on a Hopper GPU: error policy, tails and views, determinism, streams, graphs,
other devices, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from attention_call import AttentionCall

from fastattn import backends, linear_relu, mlp, reference, scaled_dot_product_attention
from fastattn.testing import assert_accurate, unit_roundoff
from fastattn.verification.shapes import DIGITS, LINEAR

pytestmark = pytest.mark.skipif(
    "cuda" not in backends.available(), reason="needs a Hopper GPU and the CUDA kernels"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def inputs(batch, heads_q, heads_k, seq_q, seq_k, dim, dim_v=None, dtype=torch.bfloat16):
    shapes = [(heads_q, seq_q, dim), (heads_k, seq_k, dim), (heads_k, seq_k, dim_v or dim)]
    return [torch.randn(batch, *s, dtype=dtype, device="cuda", requires_grad=True) for s in shapes]


def run(function, qkv, cotangent):
    qkv = [x.detach().to(cotangent.dtype).requires_grad_() for x in qkv]
    out = function(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, cotangent)]


def compare(qkv, mask=None, is_causal=False, window=None):
    """Output and gradients, forward alone for head dims that have no backward."""
    q, k, v = qkv
    group = q.shape[-3] // k.shape[-3]
    cotangent = torch.randn(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device="cuda")

    def oracle(q, k, v):
        options = {"is_causal": is_causal, "window_size": window}
        return reference.attention(q, k, v, mask, **options)[0]

    def peer(q, k, v):
        k, v = (x.repeat_interleave(group, -3) for x in (k, v))
        seen = None if mask is None else mask
        if window is not None or is_causal:
            i, j = (torch.arange(n, device="cuda") for n in (q.shape[-2], k.shape[-2]))
            offset = j[None] - i[:, None]
            left, right = window or (-1, -1)
            band = torch.ones_like(offset, dtype=torch.bool)
            band &= (offset >= -left) if left >= 0 else True
            band &= (offset <= right) if right >= 0 else True
            band &= (offset <= 0) if is_causal else True
            seen = band if seen is None else seen & band
        return F.scaled_dot_product_attention(q, k, v, seen)

    def ours(q, k, v):
        options = {"enable_gqa": True, "window_size": window, "backend": "cuda"}
        return scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, **options)

    if q.shape[-1] > 128:
        with torch.no_grad():
            wide, theirs, actual = oracle(*[x.double() for x in qkv]), peer(*qkv), ours(*qkv)
        assert_accurate("out", actual, wide, theirs)
        return
    wide = run(oracle, qkv, cotangent.double())
    theirs, actual = run(peer, qkv, cotangent), run(ours, qkv, cotangent)
    for name, a, o, p in zip(("out", "dq", "dk", "dv"), actual, wide, theirs, strict=True):
        assert_accurate(name, a, o, p)


@pytest.mark.parametrize("mask", ["none", "causal", "window", "keys"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@DTYPES
def test_error_policy(dtype, head_dim, mask):
    qkv = inputs(2, 4, 4, 1000, 1111, head_dim, dtype=dtype)
    keys = None
    if mask == "keys":
        keys = torch.rand(2, 1, 1, 1111, device="cuda") > 0.3
        keys[1, ..., 600:] = False
    compare(qkv, keys, mask == "causal", (100, 30) if mask == "window" else None)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1, 64), (2, 6, 2, 300, 77, 128), (3, 4, 1, 63, 513, 40), (1, 2, 2, 257, 130, 60),
     (1, 2, 2, 129, 191, 64, 96), (2, 8, 8, 2048, 2048, 128)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("is_causal", [False, True])
def test_shapes(shape, is_causal):
    compare(inputs(*shape), is_causal=is_causal)


def test_views():
    """Heads beside each other, offsets, broadcast keys: what TMA cannot read is copied."""
    packed = torch.randn(2, 300, 3, 4, 64, dtype=torch.bfloat16, device="cuda")
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    compare([q, k, v])
    compare([q[..., 3:], k[..., 3:], v])
    compare([q, k[:1].expand(2, -1, -1, -1), v[:, :, :1].expand(-1, -1, 300, -1)])


def test_masked_keys_never_matter():
    q, k, v = inputs(2, 4, 4, 200, 300, 64)
    keys = torch.ones(2, 1, 1, 300, dtype=torch.bool, device="cuda")
    keys[0, ..., 250:], keys[1] = False, False
    expected = run(lambda *x: scaled_dot_product_attention(*x, keys, backend="cuda"), (q, k, v),
                   torch.ones_like(q))  # fmt: skip
    with torch.no_grad():
        k[0, :, 250:], v[0, :, 250:], k[1], v[1] = torch.nan, torch.inf, torch.nan, torch.nan
    actual = run(lambda *x: scaled_dot_product_attention(*x, keys, backend="cuda"), (q, k, v),
                 torch.ones_like(q))  # fmt: skip
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert not actual[0][1].any(), "a row with nothing to attend to is 0"


def test_growing_maxima():
    """Large scores, larger from key to key: sums are scaled again, or the slack of the maximum is
    used up."""
    for slope in (0.01, 0.1, 3.0):
        for head_dim in (64, 128):
            q, k, v = inputs(1, 2, 2, 500, 1100, head_dim)
            with torch.no_grad():
                q.abs_()
                k.mul_(0.1).add_(torch.arange(1100, device="cuda")[:, None] * -slope / head_dim)
            compare([q, k, v])
            compare([q, k.detach().flip(-2), v])


def test_empty_rows_may_be_nan():
    """Behind the last key's window; and with all of their keys hidden."""
    q, k, v = (x.detach() for x in inputs(2, 4, 2, 300, 200, 64))
    keys = torch.ones(2, 1, 1, 200, dtype=torch.bool, device="cuda")
    keys[..., :5] = False
    for mask, window, rows in ((None, (20, 0), slice(220, 300)), (keys, (0, 0), slice(0, 5))):
        cotangent = torch.randn_like(q)

        def call(*qkv, mask=mask, window=window):
            options = {"enable_gqa": True, "window_size": window, "backend": "cuda"}
            return scaled_dot_product_attention(*qkv, mask, **options)

        q[:, :, rows], cotangent[:, :, rows] = 0.0, 0.0
        expected = run(call, (q, k, v), cotangent)
        q[:, :, rows], cotangent[:, :, rows] = torch.nan, torch.inf
        actual = run(call, (q, k, v), cotangent)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        assert not actual[0][:, :, rows].any()
        assert not actual[1][:, :, rows].any()
        q.normal_()


@pytest.mark.parametrize(
    "shape",
    [LINEAR["digits, 64 rows"][1:], LINEAR["digits"][1:], (300, 1000, 77), (8192, 1024, 4096),
     (1, 33, 5)],
    ids=str,
)  # fmt: skip
@DTYPES
def test_linear_relu(dtype, shape):
    m, k, n = shape
    layer = [
        torch.randn(*size, dtype=dtype, device="cuda") / scale
        for size, scale in (((m, k), 1), ((n, k), k**0.5), ((n,), 1))
    ]
    cotangent = torch.randn(m, n, dtype=dtype, device="cuda")
    # Elements that rounding may take to either side of 0 get no gradient.
    exact = F.linear(*[x.double() for x in layer])
    cotangent = torch.where(exact.abs() < 0.05, 0.0, cotangent)
    wide = run(reference.linear_relu, layer, cotangent.double())
    theirs = run(lambda *a: F.relu(F.linear(*a)), layer, cotangent)
    actual = run(lambda *a: linear_relu(*a, backend="cuda"), layer, cotangent)
    for name, a, o, p in zip(("out", "dx", "dw", "db"), actual, wide, theirs, strict=True):
        assert_accurate(name, a, o, p)
    again = run(lambda *a: linear_relu(*a, backend="cuda"), layer, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def test_linear_views_nan_and_mlp():
    x = torch.randn(70, 100, dtype=torch.bfloat16, device="cuda")
    w, v = (torch.randn(*s, dtype=x.dtype, device="cuda") for s in ((50, 60), (7, 50)))
    x[3, 5] = torch.nan
    for rows in (x[:, 3:63], x.t()[:60].t(), x[::2, :60]):
        torch.testing.assert_close(
            linear_relu(rows, w, backend="cuda"), F.relu(F.linear(rows, w)), equal_nan=True,
            atol=0.05, rtol=0.02,
        )  # fmt: skip
    torch.testing.assert_close(
        mlp(x[4:, :60], [w, v], backend="cuda"), F.linear(F.relu(F.linear(x[4:, :60], w)), v),
        atol=0.5, rtol=0.02,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 64, 1000])
@DTYPES
def test_small_mlp(dtype, rows):
    """784-128-10, all layers in one kernel, against the layers one by one."""
    pairs = list(itertools.pairwise(DIGITS))
    weights = [torch.randn(n, k, dtype=dtype, device="cuda") / k**0.5 for k, n in pairs]
    biases = [torch.randn(n, dtype=dtype, device="cuda") for _, n in pairs]
    tensors = [torch.randn(rows, DIGITS[0], dtype=dtype, device="cuda"), *weights, *biases]
    cotangent = torch.randn(rows, DIGITS[-1], dtype=dtype, device="cuda")

    def layers(x, *parameters, last=lambda x, w, b: F.linear(x, w, b)):
        return last(F.relu(F.linear(x, parameters[0], parameters[2])), *parameters[1::2])

    def ours(x, *parameters):
        return mlp(x, list(parameters[:2]), list(parameters[2:]), backend="cuda")

    wide = run(layers, tensors, cotangent.double())
    theirs, actual = run(layers, tensors, cotangent), run(ours, tensors, cotangent)
    assert_accurate("out", actual[0], wide[0], theirs[0])
    for name, a, o in zip(("dx", "dw1", "dw2", "db1", "db2"), actual[1:], wide[1:], strict=True):
        # A ReLU that rounding takes to its other side changes a gradient by more than its ulps.
        error = (a.double() - o).norm() / o.norm()
        assert error < 0.03, (name, error)
    with torch.no_grad():
        assert torch.equal(ours(*tensors), actual[0])


def test_the_second_derivative_goes_on_from_the_kernels_first():
    """Forward mode and double backward are Triton's, of what these kernels saved."""
    qkv = inputs(2, 4, 2, 200, 222, 64)
    x, w, b = (torch.randn(*s, dtype=torch.bfloat16, device="cuda", requires_grad=True)
               for s in ((100, 64), (72, 64), (72,)))  # fmt: skip
    cases = (
        (lambda q, k, v, backend: scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, backend=backend), qkv),
        (lambda x, w, b, backend: linear_relu(x, w, b, backend=backend), (x, w, b)),
        (lambda x, w, b, backend: mlp(x, [w, w.T], [b, None], backend=backend), (x, w, b)),
    )  # fmt: skip
    for function, leaves in cases:
        results = []
        for backend in ("cuda", "reference"):
            out = function(*leaves, backend)
            grads = torch.autograd.grad(out.float().square().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(grads[0].float().sin().sum(), leaves[1])
            detached = tuple(y.detach() for y in leaves)
            tangent = torch.func.jvp(lambda *y, f=function, n=backend: f(*y, n), detached, detached)
            results.append((*second, *tangent))
        for actual, expected in zip(*results, strict=True):
            error = (actual.float() - expected.float()).abs().max()
            # A few results on the way, each rounded to bfloat16.
            assert error <= 16 * unit_roundoff(torch.bfloat16) * expected.float().abs().max()


def test_sizes_of_0():
    for shape in ((0, 2, 2, 5, 5, 64), (1, 2, 2, 0, 5, 64), (1, 2, 2, 5, 0, 64)):
        q, k, v = inputs(*shape)
        out, lse = scaled_dot_product_attention(q, k, v, return_lse=True, backend="cuda")
        assert out.shape == q.shape
        assert not out.any()
        assert (lse == -torch.inf).all()
        torch.autograd.grad(out.sum(), (q, k, v))


@pytest.mark.parametrize("is_causal", [False, True])
def test_100_runs_are_one(is_causal):
    qkv = inputs(2, 8, 2, 1500, 1700, 128)
    cotangent = torch.randn_like(qkv[0])

    def call(q, k, v):
        return scaled_dot_product_attention(q, k, v, None, 0.0, is_causal, enable_gqa=True,
                                            backend="cuda")  # fmt: skip

    first = run(call, qkv, cotangent)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(call, qkv, cotangent), first, strict=True))


def layers(m, k, n):
    sizes = ((m, k), (n, k), (n,))
    return [torch.randn(*s, dtype=torch.bfloat16, device="cuda") / s[-1] ** 0.5 for s in sizes]


def linear(x, w, b):
    return linear_relu(x, w, b, backend="cuda")


def small_mlp(x, w, b):
    return mlp(x, [w, w[:10, : len(w)]], [b, b[:10]], backend="cuda")


def name_of(x) -> str:
    return getattr(x, "__name__", str(x))


@pytest.mark.parametrize(
    ("function", "shape"),
    [(linear, (700, 2000, 300)), (linear, (2048, 1024, 4096)), (small_mlp, (700, 784, 128))],
    ids=name_of,
)
def test_100_runs_of_layers_are_one(function, shape):
    tensors = layers(*shape)
    cotangent = torch.randn_like(function(*tensors))
    first = run(function, tensors, cotangent)
    for _ in range(100):
        again = run(function, tensors, cotangent)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize(
    ("function", "shape"), [(linear, (700, 2000, 300)), (small_mlp, (700, 784, 128))], ids=name_of
)
def test_layers_on_a_side_stream_and_in_a_graph(function, shape):
    tensors = layers(*shape)
    cotangent = torch.randn_like(function(*tensors))
    expected = run(function, tensors, cotangent)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        doubled = [tensors[0] * 2, *tensors[1:]]  # there only when the stream has slept
        beside = run(function, doubled, cotangent)
    stream.synchronize()
    again = run(function, doubled, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(beside, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(function, tensors, cotangent)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(captured, expected, strict=True))


def test_two_streams_at_once():
    """Two persistent kernels that share the multiprocessors must not wait for each other."""
    qkv = [inputs(4, 16, 16, 2048, 2048, 128) for _ in range(2)]

    def step(x):
        out = scaled_dot_product_attention(*x, is_causal=True, backend="cuda")
        return [out, *torch.autograd.grad(out.float().square().sum(), x)]

    expected = [step(x) for x in qkv]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in qkv]
    actual = []
    for stream, x in zip(streams, qkv, strict=True):
        with torch.cuda.stream(stream):
            actual.append(step(x))
    torch.cuda.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, e, strict=True))


def test_in_a_cuda_graph():
    q, k, v = (x.detach() for x in inputs(1, 4, 4, 512, 512, 64))
    g = torch.randn_like(q)

    call = AttentionCall(q, k, v, is_causal=True, scale=0.125)

    def step():
        out, *_ = call.forward()
        return out, *call.backward(g)[:3]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    qkv = [x.detach().to("cuda:1") for x in inputs(1, 2, 2, 300, 300, 64)]
    with torch.cuda.device(0):
        out = scaled_dot_product_attention(*qkv, backend="cuda")
    assert out.device == qkv[0].device
    assert_accurate("out", out, reference.attention(*[x.double() for x in qkv])[0],
                    F.scaled_dot_product_attention(*qkv))  # fmt: skip


def test_bad_input_is_refused_before_the_launch():
    q, k, v = (x.detach() for x in inputs(1, 2, 2, 8, 8, 64))
    for call, reason in (
        (AttentionCall(q.float(), k.float(), v.float()), "dtype"),
        (AttentionCall(q, k[..., :32], v), "key: expected"),
        (AttentionCall(q, k, v, scale=-1.0), "scale"),
        (AttentionCall(q, k, v, dropout_p=0.5), "dropout"),
        (AttentionCall(q, k, v, softcap=3.0), "softcap"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            call.forward()
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve attention"):
        scaled_dot_product_attention(q, k, v, dropout_p=0.5, backend="cuda")
