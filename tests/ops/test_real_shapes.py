"""The kernels on the sizes of real models, of one key head, as accurate as torch in the same
dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import reference
from fastattn.testing import assert_accurate
from fastattn.verification.shapes import ATTENTION, LINEAR

pytestmark = pytest.mark.native
DTYPES = (torch.float32, torch.bfloat16)


def gradients(function, leaves, cotangent):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


# The oracle keeps several matrices of scores in float64, which a long sequence makes large.
@pytest.mark.parametrize(
    "name", [name for name, s in ATTENTION.items() if s.seq_q * s.seq_k <= 1024**2]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype, name):
    shape = ATTENTION[name]
    group = shape.heads_q // shape.heads_k
    q = torch.randn(1, group, shape.seq_q, shape.head_dim, dtype=dtype)
    k = torch.randn(1, 1, shape.seq_k, shape.head_dim, dtype=dtype)
    v = torch.randn(1, 1, shape.seq_k, shape.head_dim_v, dtype=dtype)
    causal = {"is_causal": shape.is_causal}

    def oracle(q, k, v):
        return reference.attention(q, k, v, **causal)[0]

    def peer(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **causal)

    def ours(q, k, v):
        return fastattn.scaled_dot_product_attention(
            q, k, v, enable_gqa=True, backend="cpu", **causal
        )

    cotangent = torch.randn(*q.shape[:-1], shape.head_dim_v, dtype=dtype)
    wide = gradients(oracle, [x.double() for x in (q, k, v)], cotangent)
    theirs = gradients(peer, (q, k, v), cotangent)
    actual = gradients(ours, (q, k, v), cotangent)
    for what, a, o, p in zip(("out", "dq", "dk", "dv"), actual, wide, theirs, strict=True):
        assert_accurate(what, a, o, p)


# BERT's layer on 1024 rows is the one on 128 rows, eight times as long.
@pytest.mark.parametrize("name", [name for name in LINEAR if name != "BERT-base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_relu(dtype, name):
    _, m, k, n = LINEAR[name]
    x, w = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype) / k**0.5
    b = torch.randn(n, dtype=dtype)
    # The rounding decides what passes the ReLU where a sum is about 0; no gradient arrives there.
    sums = F.linear(*(t.double() for t in (x, w, b)))
    cotangent = torch.randn(m, n).masked_fill_(sums.abs() < 0.05, 0.0).to(dtype)
    wide = gradients(reference.linear_relu, [t.double() for t in (x, w, b)], cotangent)
    peer = gradients(lambda x, w, b: F.relu(F.linear(x, w, b)), (x, w, b), cotangent)
    actual = gradients(lambda *t: fastattn.linear_relu(*t, backend="cpu"), (x, w, b), cotangent)
    for what, a, o, p in zip(("out", "dx", "dw", "db"), actual, wide, peer, strict=True):
        assert_accurate(what, a, o, p)
