"""Bad input: the argument, what was expected, what was got."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

import fastattn

# Every call is refused for a shape, a dtype or a layout: the values do not matter.
Q = torch.ones(1, 4, 5, 8)
NESTED = torch.nested.as_nested_tensor([Q[0]])

ATTENTION = [
    (TypeError, "query", dict(query=Q.long())),
    (TypeError, "query", dict(query=[1.0])),
    (ValueError, "query", dict(query=torch.ones(8))),
    (TypeError, "key", dict(key=Q.double())),
    (ValueError, "key", dict(key=Q[0, 0, 0])),
    (ValueError, "key", dict(key=torch.ones(1, 4, 5, 9))),
    (ValueError, "key", dict(key=Q.to("meta"))),
    (ValueError, "value", dict(value=torch.ones(1, 4, 6, 8))),
    (ValueError, "value", dict(value=torch.ones(1, 2, 5, 8))),
    (ValueError, "key", dict(key=Q[:, :2], value=Q[:, :2])),
    (ValueError, "key", dict(key=Q[:, :3], value=Q[:, :3], enable_gqa=True)),
    (ValueError, "key", dict(key=Q.expand(3, 4, 5, 8), query=Q.expand(2, 4, 5, 8))),
    (ValueError, "value", dict(value=Q.expand(3, 4, 5, 8), query=Q.expand(2, 4, 5, 8))),
    (ValueError, "value", dict(key=Q[:, :2], value=Q[:, :3], enable_gqa=True)),
    (ValueError, "key", dict(query=Q[:, :1], enable_gqa=True)),
    (ValueError, "key", dict(key=Q[:, :0], value=Q[:, :0], enable_gqa=True)),
    *[
        (TypeError, name, {name: x})
        for name in ("query", "key", "value", "attn_mask")
        for x in (
            Q.to_sparse(),
            Q.flatten(1).to_sparse_csr(),
            torch.nested.as_nested_tensor([Q[0]]),
        )
    ],
    (ValueError, "attn_mask", dict(attn_mask=torch.zeros(4, 5))),
    (TypeError, "attn_mask", dict(attn_mask=torch.zeros(5, 5, dtype=torch.int32))),
    (ValueError, "attn_mask", dict(attn_mask=torch.zeros(1, 1, 1, 5, 5))),
    (ValueError, "dropout_p", dict(dropout_p=1.5)),
    (ValueError, "dropout_p", dict(dropout_p=math.nan)),
    (TypeError, "dropout_p", dict(dropout_p=torch.ones(2))),
    (TypeError, "dropout_p", dict(dropout_p=None)),
    (ValueError, "dropout_p", dict(dropout_p=-0.1)),
    (TypeError, "dropout_p", dict(dropout_p="a lot")),
    (ValueError, "scale", dict(scale=math.nan)),
    (ValueError, "scale", dict(scale=10**400)),
    (TypeError, "scale", dict(scale=1j)),
    (TypeError, "scale", dict(scale=torch.tensor(1j))),
    (TypeError, "scale", dict(scale=torch.ones((), requires_grad=True))),
    (ValueError, "window_size", dict(window_size=(1,))),
    (ValueError, "window_size", dict(window_size=(1, 1.5))),
    (ValueError, "window_size", dict(window_size=(-2, 1))),
    (ValueError, "window_size", dict(window_size=3)),
    (ValueError, "softcap", dict(softcap=-1.0)),
    (TypeError, "softcap", dict(softcap="high")),
    (ValueError, "alibi_slopes", dict(alibi_slopes=torch.ones(3))),
    (ValueError, "alibi_slopes", dict(alibi_slopes=torch.ones(4, device="meta"))),
    (TypeError, "alibi_slopes", dict(alibi_slopes=[1.0] * 4)),
    (TypeError, "alibi_slopes", dict(alibi_slopes=torch.ones(4).to_sparse())),
    (ValueError, "backend", dict(backend="tpu")),
    (RuntimeError, "backend", dict(backend="cuda")),
]


@pytest.mark.parametrize("kind, argument, change", ATTENTION)
def test_attention(kind, argument, change):
    with pytest.raises(kind, match=rf"^{argument}\b"):
        fastattn.scaled_dot_product_attention(**(dict(query=Q, key=Q, value=Q) | change))


X, W, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)


@pytest.mark.parametrize(
    "kind, argument, call",
    [
        (TypeError, "input", lambda: fastattn.linear_relu(X.long(), W)),
        (TypeError, "input", lambda: fastattn.linear_relu(None, W)),
        (ValueError, "weight", lambda: fastattn.linear_relu(X, B)),
        (ValueError, "weight", lambda: fastattn.linear_relu(X, W.T)),
        (TypeError, "weight", lambda: fastattn.linear_relu(X, W.half())),
        (ValueError, "bias", lambda: fastattn.linear_relu(X, W, X[0])),
        (ValueError, "backend", lambda: fastattn.linear_relu(X, W, backend="gpu")),
        (ValueError, "weights", lambda: fastattn.mlp(X, [])),
        (ValueError, "biases", lambda: fastattn.mlp(X, [W], [B, B])),
        (ValueError, "weight 1", lambda: fastattn.mlp(X, [W, W])),
        (TypeError, "cu_seq_q", lambda: fastattn.varlen_attn(*[Q[0]] * 3, [0, 4], [0, 4], 4, 4)),
        (
            ValueError,
            "cu_seq_q",
            lambda: fastattn.varlen_attn(*[Q[0]] * 3, *[torch.tensor([0, 3])] * 2, 4, 4),
        ),
        (
            ValueError,
            "max_q",
            lambda: fastattn.varlen_attn(*[Q[0]] * 3, *[torch.tensor([0, 4])] * 2, 3, 4),
        ),
        (ValueError, "op", lambda: fastattn.backends.explain("conv", Q)),
        *[
            (TypeError, name, call)
            for bad in (lambda x: x.to_sparse(), lambda x: torch.nested.as_nested_tensor([x]))
            for name, call in (
                ("input", lambda bad=bad: fastattn.linear_relu(bad(X), W)),
                ("weight", lambda bad=bad: fastattn.linear_relu(X, bad(W))),
                ("bias", lambda bad=bad: fastattn.linear_relu(X, W, bad(B))),
                ("input", lambda bad=bad: fastattn.mlp(bad(X), [W])),
                ("weight 1", lambda bad=bad: fastattn.mlp(X, [W, bad(W)])),
                ("bias 0", lambda bad=bad: fastattn.mlp(X, [W, W], [bad(B), None])),
            )
        ],
    ],
)
def test_the_others(kind, argument, call):
    with pytest.raises(kind, match=rf"^{argument}\b.*expected"):
        call()


STARTS = torch.tensor([0, 5])
VARLEN = [
    (TypeError, "alibi_slopes", dict(alibi_slopes=[1.0] * 4)),
    (TypeError, "alibi_slopes", dict(alibi_slopes=1.0)),
    (ValueError, "alibi_slopes", dict(alibi_slopes=torch.ones(2, 4))),
    (TypeError, "max_q", dict(max_q=5.5)),
    (TypeError, "max_q", dict(max_q="5")),
    (TypeError, "max_k", dict(max_k=None)),
    (TypeError, "max_k", dict(max_k=True)),
    (ValueError, "max_k", dict(max_k=-(10**30))),
    (TypeError, "query", dict(query=Q[0].to_sparse())),
    (TypeError, "key", dict(key=Q[0].to_sparse())),
    (TypeError, "value", dict(value=Q[0].transpose(0, 1).double())),
    (ValueError, "key", dict(key=Q[0].transpose(0, 1)[:, :3])),
    (TypeError, "cu_seq_k", dict(cu_seq_k=STARTS.to_sparse())),
    (TypeError, "cu_seq_q", dict(cu_seq_q=STARTS.float())),
    (ValueError, "cu_seq_k", dict(cu_seq_k=torch.tensor([0, 5, 5]))),
    (TypeError, "scale", dict(scale="1")),
    (ValueError, "dropout_p", dict(dropout_p=2)),
    (ValueError, "softcap", dict(softcap=-1)),
    (ValueError, "window_size", dict(window_size=(0, -2))),
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind, argument, change", VARLEN)
def test_packed_sequences(kind, argument, change, backend):
    tokens = Q[0].transpose(0, 1)
    call = dict(query=tokens, key=tokens, value=tokens, cu_seq_q=STARTS, cu_seq_k=STARTS)
    call |= dict(max_q=5, max_k=5, backend=backend)
    fastattn.varlen_attn(**call | dict(max_q=10**30, softcap=None))
    with pytest.raises(kind, match=rf"^{argument}: expected .*, got "):
        fastattn.varlen_attn(**call | change)


def test_the_environment_names_an_unknown_backend():
    result = subprocess.run(
        [sys.executable, "-c", "import fastattn"],
        env=os.environ | {"FASTATTN_BACKEND": "gpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "ValueError: FASTATTN_BACKEND: expected one of cpu, cuda" in result.stderr
    assert "got 'gpu'" in result.stderr


def test_the_environment_names_a_backend_that_cannot(monkeypatch):
    monkeypatch.setattr(fastattn.backends, "_default", "cuda")
    with pytest.raises(RuntimeError, match=r"backend 'cuda' \(FASTATTN_BACKEND\) cannot serve"):
        fastattn.scaled_dot_product_attention(Q, Q, Q)


@pytest.mark.native
def test_explain_names_the_backend_and_the_reasons():
    text = str(fastattn.backends.explain("attention", Q, Q, Q))
    assert text.startswith("attention: cpu")
    assert "cuda" in text
    slopes = torch.ones(Q.shape[-3], requires_grad=True)
    explanation = fastattn.backends.explain("attention", Q, Q, Q, alibi_slopes=slopes)
    assert explanation.backend == "reference"
    assert "alibi_slopes" in str(explanation)
    assert fastattn.backends.available() == ["cpu", "reference"]
