"""torch's own functions of attention through torch.compile(backend="fastattn")."""

from __future__ import annotations

import compiled
import pytest
import torch
import torch.nn.functional as F
from compiled import assert_same, fused, kernel_calls, no_graph_of_another_test, unsupported  # noqa: F401
from torch import Tensor, nn

pytestmark = compiled.MARKS


ATTENTION = {
    "plain": lambda: {},
    "causal": lambda: {"is_causal": True},
    "scale": lambda: {"scale": 0.3},
    "bool mask": lambda: {"attn_mask": torch.rand(2, 1, 6, 9) > 0.3},
    "float mask": lambda: {"attn_mask": torch.randn(6, 9)},
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case, kernel_calls):  # noqa: F811
    options = ATTENTION[case]()
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 5)
    assert_same(lambda *qkv: F.scaled_dot_product_attention(*qkv, **options), q, k, v)
    assert fused() == kernel_calls == ["scaled_dot_product_attention"]


def test_grouped_queries():
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    assert_same(lambda *qkv: F.scaled_dot_product_attention(*qkv, enable_gqa=True), q, k, v)
    assert fused() == ["scaled_dot_product_attention"]


@pytest.mark.parametrize("weights", ["not asked for", "not read", "read"])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "wrong hint"])
def test_multi_head_attention(weights, masks, kernel_calls):  # noqa: F811
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    options = {"need_weights": weights != "not asked for"}
    if masks == "padding":
        options["key_padding_mask"] = torch.arange(6) >= torch.tensor([[4], [6]])
    elif masks != "none":
        above = torch.ones(6, 6, dtype=torch.bool).triu(1 if masks == "causal" else 3)
        options |= {"attn_mask": above, "is_causal": True}

    def call(x: Tensor) -> Tensor:
        out = layer(x, x, x, **options)
        return out[0] + out[1].sum() if weights == "read" else out[0]

    assert_same(call, torch.randn(2, 6, 8), parameters=list(layer.parameters()))
    assert kernel_calls == ["scaled_dot_product_attention"] * (weights != "read")
    if weights == "read":
        assert not fused()
        assert "its attention weights are read" in unsupported()
    else:
        assert fused() == ["torch's on fastattn scaled_dot_product_attention"]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("grad", [False, True])
def test_encoder_layers(norm_first, activation, grad, kernel_calls):  # noqa: F811
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, activation=activation, norm_first=norm_first, batch_first=True
    ).eval()
    with torch.set_grad_enabled(grad):
        assert_same(layer, torch.randn(2, 6, 8))
    fed = "mlp" if activation == "relu" else "linear"
    norms = ["dropout_add_norm"] * (1 if norm_first else 2)
    if grad:  # torch's sums and norms
        assert sorted(fused()) == sorted([fed, "torch's on fastattn scaled_dot_product_attention"])
        assert kernel_calls == ["scaled_dot_product_attention", fed]
    else:
        assert fused() == ["scaled_dot_product_attention, mlp"]
        assert sorted(kernel_calls) == sorted(["scaled_dot_product_attention", fed, *norms])


def test_encoder_layer_with_a_mask_at_inference_is_torchs():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    padding = torch.arange(6) >= torch.tensor([[4], [6]])
    with torch.no_grad():
        assert_same(lambda x: layer(x, src_key_padding_mask=padding), torch.randn(2, 6, 8))
    assert not fused()
    assert "it has a mask" in unsupported()
