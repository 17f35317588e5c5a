"""What only a GPU shows: real sizes against the error policy, streams, graphs, the compiler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import reference
from fastattn.ops.triton import config
from fastattn.testing import assert_accurate
from fastattn.verification.shapes import LINEAR

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
first_on_gpu = pytest.mark.first_on_gpu  # compile_only.py compiles the kernels of these ahead

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FIRST = [(torch.bfloat16, head_dim) for head_dim in (64, 128)]
REST = [(d, n) for d in DTYPES for n in (64, 80, 128, 256) if (d, n) not in FIRST]
CASES = [pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=first_on_gpu) for case in FIRST]
CASES += [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in REST]


def leaves(*shape, dtype=torch.bfloat16):
    return [torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for _ in range(3)]


def gradients(function, inputs, cotangent):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("dtype, head_dim", CASES)
def test_error_policy(dtype, head_dim, mask):
    seq_q, seq_k = 1000, 1111
    q = torch.randn(2, 4, seq_q, head_dim, dtype=dtype, device="cuda")
    k, v = (torch.randn(2, 4, seq_k, head_dim, dtype=dtype, device="cuda") for _ in range(2))
    inputs, causal, fixed = [q, k, v], mask == "causal", None
    if mask == "bool":
        fixed = torch.rand(2, 1, seq_q, seq_k, device="cuda") > 0.3
    if mask == "float":
        inputs.append(torch.randn(1, 4, seq_q, seq_k, dtype=dtype, device="cuda"))

    def call(function):
        return lambda q, k, v, bias=fixed: function(q, k, v, bias, 0.0, causal)

    def oracle(q, k, v, bias=fixed):
        return reference.attention(q, k, v, bias, is_causal=causal)[0]

    cotangent = torch.randn_like(q)
    wide = gradients(oracle, [x.double() for x in inputs], cotangent)
    peer = gradients(call(F.scaled_dot_product_attention), inputs, cotangent)
    actual = gradients(call(fastattn.scaled_dot_product_attention), inputs, cotangent)
    for name, a, o, p in zip(("out", "dq", "dk", "dv", "dmask"), actual, wide, peer, strict=False):
        assert_accurate(name, a, o, p)


@pytest.mark.parametrize("mask", ["none", "causal", "float"])
@pytest.mark.parametrize("dtype, head_dim", CASES)
def test_second_order_error_policy(dtype, head_dim, mask):
    shapes = [(2, 4, 1000, head_dim), *[(2, 4, 1111, head_dim)] * 2]
    shapes += [(1, 4, 1000, 1111)] if mask == "float" else []
    inputs, tangents = (
        [torch.randn(shape, dtype=dtype, device="cuda") for shape in shapes] for _ in range(2)
    )
    cotangent = torch.randn(shapes[0], dtype=dtype, device="cuda")

    def second(function, wide=False):
        kind = torch.float64 if wide else dtype
        leaves = [x.detach().to(kind).requires_grad_() for x in (cotangent, *inputs)]
        grads = torch.autograd.grad(function(*leaves[1:]), leaves[1:], leaves[0], create_graph=True)
        products = sum((g * t.to(kind)).sum() for g, t in zip(grads, tangents, strict=True))
        return torch.autograd.grad(products, leaves)

    def oracle(q, k, v, bias=None):
        return reference.attention(q, k, v, bias, is_causal=mask == "causal")[0]

    def peer(q, k, v, bias=None):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, bias, is_causal=mask == "causal")

    def ours(q, k, v, bias=None):
        return fastattn.scaled_dot_product_attention(q, k, v, bias, is_causal=mask == "causal")

    results = zip(second(ours), second(oracle, wide=True), second(peer), strict=True)
    for name, (actual, wide, theirs) in zip(("t_out", "gq", "gk", "gv", "gm"), results,
                                            strict=False):  # fmt: skip
        assert_accurate(name, actual, wide, theirs)


@first_on_gpu
def test_the_second_order_in_a_cuda_graph():
    q, k, v = (x.detach() for x in leaves(2, 4, 500, 64))
    graph = torch.cuda.CUDAGraph()

    def tangent():
        return torch.func.jvp(fastattn.scaled_dot_product_attention, (q, k, v), (k, v, q))[1]

    tangent()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = tangent()
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, tangent())


@pytest.mark.parametrize(
    "shape", [LINEAR["digits, 64 rows"][1:], LINEAR["BERT-base"][1:], (300, 1000, 77)], ids=str
)
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, marks=first_on_gpu), *DTYPES[1:]], ids=str
)
def test_linear_error_policy(dtype, shape):
    m, k, n = shape
    inputs = [
        torch.randn(*size, dtype=dtype, device="cuda") / scale
        for size, scale in (((m, k), 1), ((n, k), k**0.5), ((n,), 1))
    ]
    cotangent = torch.randn(m, n, dtype=dtype, device="cuda")
    # Elements that rounding may take to either side of 0 get no gradient.
    exact = F.linear(*[x.double() for x in inputs])
    cotangent = torch.where(exact.abs() < 0.05, 0.0, cotangent)
    wide = gradients(reference.linear_relu, [x.double() for x in inputs], cotangent)
    peer = gradients(lambda *a: F.relu(F.linear(*a)), inputs, cotangent)
    actual = gradients(fastattn.linear_relu, inputs, cotangent)
    for name, a, o, p in zip(("out", "dx", "dw", "db"), actual, wide, peer, strict=True):
        assert_accurate(name, a, o, p)


def test_float32_infinities_and_nans_are_those_of_ieee(monkeypatch):
    """tf32x3 takes differences of operands, of which infinities have none."""
    q, k, v = (torch.randn(1, 4, 300, 64, device="cuda") for _ in range(3))
    q[0, 0, 5, 3], q[0, 0, 70, 1], k[0, 1, 7, 2] = float("inf"), float("nan"), float("inf")
    v[0, 2, 9, 1], v[0, 2, 9, 2], v[0, 2, 11, 4] = float("inf"), -float("inf"), float("nan")
    k[:, :, 20], v[:, :, 20] = float("inf"), float("nan")
    mask = torch.ones(1, 1, 300, 300, dtype=torch.bool, device="cuda")
    mask[..., 20] = False

    def results():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.scaled_dot_product_attention(*inputs, mask, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    actual = results()
    monkeypatch.setattr(config, "FLOAT32_PRODUCTS", "ieee")
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, results(), strict=True):
        assert e.isnan().any(), name
        assert e.isfinite().any(), name
        torch.testing.assert_close(a, e, equal_nan=True, atol=1e-4, rtol=1e-4)


def test_dropout_is_the_oracles():
    q, k = (torch.randn(2, 3, 300, 32, device="cuda") for _ in range(2))
    v = torch.eye(300, device="cuda")[:, :256].expand(2, 3, 300, 256)
    torch.manual_seed(3)
    out = fastattn.scaled_dot_product_attention(q, k, v, dropout_p=0.4, backend="triton")
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (1,), device="cuda")
    keep = reference.philox_keep_mask(seed, 2, 3, 300, 300, 0.4, q.device)
    assert torch.equal(out != 0, keep[..., :256])


@first_on_gpu
def test_on_a_side_stream():
    q, k, v = leaves(2, 8, 1024, 64)
    expected = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected_grads = torch.autograd.grad(expected.float().square().sum(), (q, k, v))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work on another stream would be done long before
        late = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.scaled_dot_product_attention(*late, is_causal=True)
        grads = torch.autograd.grad(out.float().square().sum(), late)
    stream.synchronize()
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@first_on_gpu
def test_in_a_cuda_graph():
    q, k, v = (x.detach() for x in leaves(1, 4, 512, 64))
    mask = torch.rand(1, 1, 512, 512, device="cuda") > 0.5
    x, w = (torch.randn(n, 256, device="cuda", dtype=torch.bfloat16) for n in (64, 128))

    def step():
        with torch.no_grad():
            return (
                fastattn.scaled_dot_product_attention(q, k, v, mask),
                fastattn.scaled_dot_product_attention(q, k, v, is_causal=True),
                fastattn.linear_relu(x, w),
            )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in (q, k, v, x, w):
        tensor.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_torch_compile():
    q, k, v = leaves(2, 4, 300, 64, dtype=torch.float32)
    w = torch.randn(32, 64, device="cuda", requires_grad=True)

    def function(q, k, v, w):
        out = fastattn.scaled_dot_product_attention(q * 2, k, v, is_causal=True)
        return fastattn.linear_relu(out + 1, w).square().sum()

    compiled = torch.compile(function, fullgraph=True)
    expected, actual = (
        [value, *torch.autograd.grad(value, (q, k, v, w))]
        for value in (function(q, k, v, w), compiled(q, k, v, w))
    )
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


def test_a_head_beyond_32_bit_offsets():
    rows = 2**31 // 4096 + 100
    wide = torch.empty(1, rows, 4096, dtype=torch.bfloat16, device="cuda")
    wide[..., :64].normal_()
    q = wide[:, None, :, :64]  # row stride 4096: the last rows begin beyond 2^31
    few = torch.randn(1, 1, 64, 64, dtype=torch.bfloat16, device="cuda")
    out = fastattn.scaled_dot_product_attention(q, few, few)
    expected = fastattn.scaled_dot_product_attention(q[:, :, -500:].contiguous(), few, few)
    torch.testing.assert_close(out[:, :, -500:], expected)
