"""First derivatives by gradcheck in float64 through the kernels, for every option."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastattn
from fastattn import reference

NATIVE = pytest.mark.native
BACKENDS = [pytest.param("cpu", marks=NATIVE), "reference"]


def inputs(heads_k: int = 4, dim_v: int = 3, seq_q: int = 5, seq_k: int = 6):
    q = torch.randn(2, 4, seq_q, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, heads_k, seq_k, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, heads_k, seq_k, dim_v, dtype=torch.float64, requires_grad=True)
    return q, k, v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "extra", ["plain", "gqa", "dim_v", "dropout", "lse", "window", "softcap", "alibi"]
)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "broadcast float"])
def test_attention(mask, extra, backend):
    q, k, v = inputs(heads_k=2 if extra == "gqa" else 4, dim_v=5 if extra == "dim_v" else 3)
    attn_mask = None
    if mask == "bool":
        attn_mask = torch.rand(2, 1, 5, 6) > 0.3
        attn_mask[:, :, 2] = False  # a row with nothing to attend to
    elif mask == "float":
        attn_mask = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    elif mask == "broadcast float":
        attn_mask = torch.randn(4, 1, 6, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, attn_mask):
        torch.manual_seed(7)  # the same dropout mask in every evaluation
        result = fastattn.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask,
            dropout_p=0.3 if extra == "dropout" else 0.0,
            is_causal=mask == "causal",
            enable_gqa=True,
            window_size=(2, 1) if extra == "window" else None,
            softcap=0.7 if extra == "softcap" else 0.0,
            alibi_slopes=torch.tensor([0.5, 0.1, 0.2, 0.3]) if extra == "alibi" else None,
            return_lse=extra == "lse",
            backend=backend,
        )
        if extra != "lse":
            return result
        return result[0], torch.where(result[1] == -math.inf, 0.0, result[1])

    # The reference's derivatives are autograd's: a random direction shows a wrong one.
    assert gradcheck(function, (q, k, v, attn_mask), fast_mode=backend == "reference")
    if backend == "reference" and extra in ("plain", "lse"):
        assert gradgradcheck(function, (q, k, v, attn_mask), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_relu_and_mlp(bias, backend):
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(7, dtype=torch.float64, requires_grad=True) if bias else None
    # Away from the kink, where the finite differences of ReLU mean nothing.
    assert torch.nn.functional.linear(x, w, b).abs().min() > 1e-4
    assert gradcheck(lambda *a: fastattn.linear_relu(*a, backend=backend), (x, w, b))
    w2 = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda x, w, b, w2: fastattn.mlp(x, [w, w2], [b, None], backend=backend), (x, w, b, w2)
    )


@NATIVE
@pytest.mark.parametrize("which", range(4))
def test_only_what_is_needed_gets_a_gradient(which):
    leaves = [x.detach() for x in inputs()] + [torch.randn(5, 6, dtype=torch.float64)]
    leaves[which].requires_grad_()
    fastattn.scaled_dot_product_attention(*leaves).sum().backward()
    assert [x.grad is not None for x in leaves] == [i == which for i in range(4)]


@NATIVE
def test_a_graph_of_the_first_derivative_has_the_right_first_derivative():
    q, k, v = inputs()
    grads = []
    for create_graph in (False, True):
        out = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=create_graph))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@NATIVE
def test_dropout_is_the_same_on_every_backend():
    q, k, v = inputs()
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(11)
        out = fastattn.scaled_dot_product_attention(q, k, v, None, 0.4, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    torch.testing.assert_close(*results)


def test_dropout_keeps_the_expectation():
    keep = reference.philox_keep_mask(torch.tensor([5]), 4, 4, 128, 128, 0.25, torch.device("cpu"))
    assert abs(keep.double().mean().item() - 0.75) < 4 * math.sqrt(0.25 * 0.75 / keep.numel())


@NATIVE
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compile_fullgraph(dropout):
    q, k, v = (x.detach().float().requires_grad_() for x in inputs())
    w = torch.randn(4, 3, requires_grad=True)
    w2 = torch.randn(2, 4, requires_grad=True)

    def function(q, k, v, w, w2):
        out = fastattn.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
        return fastattn.mlp(out, [w, w2]).sum() + fastattn.linear_relu(out, w).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, compiled):
        torch.manual_seed(3)
        value = f(q, k, v, w, w2)
        results.append((value, *torch.autograd.grad(value, (q, k, v, w, w2))))
    torch.testing.assert_close(*results)


@NATIVE
def test_compile_a_call_that_repeats_a_tensor():
    x = torch.randn(1, 2, 9, 9, requires_grad=True)

    def function(x):
        return fastattn.linear_relu(fastattn.scaled_dot_product_attention(x, x, x), x[0, 0])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x).square().sum(), x) for f in (function, compiled)]
    torch.testing.assert_close(*grads)


@NATIVE
def test_the_functions_by_themselves():
    q, k, v = inputs()
    call = fastattn.ops.Call(fastattn.ops.Options(is_causal=True, scale=0.5))
    extras = fastattn.ops.Extras()
    out = fastattn.functional.AttentionFunction.apply(call, q, k, v, None, *extras)[0]
    expected = reference.attention(q, k, v, is_causal=True, scale=0.5)[0]
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y, _ = fastattn.functional.LinearReLUFunction.apply(out, w, None)
    wanted = reference.linear_relu(expected, w)
    torch.testing.assert_close(y, wanted)
    grads, expected = (torch.autograd.grad(x.square().sum(), (q, k, v, w)) for x in (y, wanted))
    torch.testing.assert_close(grads, expected)


@NATIVE
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_linear_in_the_sequence():
    """Forward and backward of S = 32768, whose scores would take 4 GiB, within 150 MB beside the
    inputs, the output and the gradients, which are 64 MB."""
    program = """
import re, torch, fastattn
torch.set_num_threads(2)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
def step(s):
    q, k, v = (torch.randn(1, 1, s, 64, requires_grad=True) for _ in range(3))
    fastattn.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
step(64)
before = peak()
step(32768)
print((peak() - before) // 1024)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 150 + 64


def test_varlen_is_the_sequences_one_by_one():
    lengths_q, lengths_k = [3, 0, 7], [4, 2, 7]
    q, k, v = torch.randn(10, 4, 8), torch.randn(13, 2, 8), torch.randn(13, 2, 5)
    cu_q, cu_k = torch.tensor([0, 3, 3, 10]), torch.tensor([0, 4, 6, 13])
    out, lse = fastattn.varlen_attn(q, k, v, cu_q, cu_k, 7, 7, is_causal=True, return_lse=True)
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        expected, expected_lse = reference.attention(
            q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1), is_causal=True
        )
        torch.testing.assert_close(out[a:b], expected.transpose(0, 1))
        torch.testing.assert_close(lse[:, a:b], expected_lse)
    assert lengths_q == cu_q.diff().tolist()
    assert lengths_k == cu_k.diff().tolist()


def test_what_the_kernels_do_not_take_goes_to_the_reference_with_a_warning(monkeypatch):
    monkeypatch.setattr(fastattn.backends, "_warned", set())
    q, k, v = inputs()
    slopes = torch.tensor([0.5, 0.1, 0.2, 0.3], dtype=q.dtype, requires_grad=True)
    with pytest.warns(fastattn.FastAttnWarning, match="alibi_slopes"):
        out = fastattn.scaled_dot_product_attention(q, k, v, alibi_slopes=slopes)
    torch.testing.assert_close(out, reference.attention(q, k, v, alibi_slopes=slopes)[0])
    (grad,) = torch.autograd.grad(out.sum(), slopes)
    assert grad.any()
    with pytest.raises(RuntimeError, match="alibi_slopes no gradient"):
        fastattn.scaled_dot_product_attention(q, k, v, alibi_slopes=slopes, backend="cpu")
