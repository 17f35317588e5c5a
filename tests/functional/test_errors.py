"""Bad input: the argument, what was expected, what was got."""

from __future__ import annotations

import math

import pytest
import torch

import fastattn

Q = torch.randn(1, 4, 5, 8)

ATTENTION = [
    (TypeError, "query", dict(query=Q.long())),
    (TypeError, "query", dict(query=[1.0])),
    (ValueError, "query", dict(query=torch.randn(8))),
    (TypeError, "key", dict(key=Q.double())),
    (ValueError, "key", dict(key=Q[0])),
    (ValueError, "key", dict(key=torch.randn(1, 4, 5, 9))),
    (ValueError, "key", dict(key=Q.to("meta"))),
    (ValueError, "value", dict(value=torch.randn(1, 4, 6, 8))),
    (ValueError, "value", dict(value=torch.randn(1, 2, 5, 8))),
    (ValueError, "key", dict(key=Q[:, :2], value=Q[:, :2])),
    (ValueError, "key", dict(key=Q[:, :3], value=Q[:, :3], enable_gqa=True)),
    (ValueError, "key, value", dict(key=Q.expand(3, 4, 5, 8), query=Q.expand(2, 4, 5, 8))),
    (ValueError, "attn_mask", dict(attn_mask=torch.zeros(4, 5))),
    (TypeError, "attn_mask", dict(attn_mask=torch.zeros(5, 5, dtype=torch.int32))),
    (ValueError, "attn_mask", dict(attn_mask=torch.zeros(1, 1, 1, 5, 5))),
    (ValueError, "dropout_p", dict(dropout_p=1.0)),
    (ValueError, "dropout_p", dict(dropout_p=-0.1)),
    (TypeError, "dropout_p", dict(dropout_p="a lot")),
    (ValueError, "scale", dict(scale=math.nan)),
    (ValueError, "window_size", dict(window_size=(1,))),
    (ValueError, "softcap", dict(softcap=-1.0)),
    (ValueError, "alibi_slopes", dict(alibi_slopes=torch.randn(3))),
    (ValueError, "backend", dict(backend="tpu")),
    (RuntimeError, "backend", dict(backend="cuda")),
]


@pytest.mark.parametrize("kind, argument, change", ATTENTION)
def test_attention(kind, argument, change):
    with pytest.raises(kind, match=argument):
        fastattn.scaled_dot_product_attention(**(dict(query=Q, key=Q, value=Q) | change))


X, W, B = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)


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
    ],
)
def test_the_others(kind, argument, call):
    with pytest.raises(kind, match=argument):
        call()


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
