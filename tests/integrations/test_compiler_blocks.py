"""The blocks of Hugging Face's models through torch.compile(backend="fastattn")."""

from __future__ import annotations

import copy
from collections import Counter

import compiled
import pytest
import torch
from compiled import no_graph_of_another_test, torchs_draws  # noqa: F401
from torch import nn

import fastattn

pytest.importorskip("transformers")
pytestmark = compiled.MARKS

from tiny_models import LLAMA, TEXT, VISION, build  # noqa: E402

BERT = {**TEXT, "intermediate_size": 48}
DISTIL = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
OFF = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout",
       "resid_pdrop", "embd_pdrop", "attn_pdrop")  # fmt: skip
ATTENTION = "scaled_dot_product_attention"
# What is fused in training without dropout, with dropout, and in evaluation without gradients.
MODELS: dict[str, tuple[dict, dict, dict, dict]] = {
    "BertModel": (
        BERT,
        {ATTENTION: 2, "linear, gelu": 2},
        {ATTENTION: 2, "linear, gelu": 2, "dropout, sum, layer_norm": 4, "dropout": 1},
        {ATTENTION: 2, "linear, gelu": 2, "sum, layer_norm": 4},
    ),
    "DistilBertModel": (
        DISTIL,
        {ATTENTION: 2, "linear, gelu": 2},
        {ATTENTION: 2, "linear, gelu": 2, "dropout, sum, layer_norm": 2, "dropout": 1},
        {ATTENTION: 2, "linear, gelu": 2, "sum, layer_norm": 4},
    ),
    "GPT2Model": (
        GPT2,
        {ATTENTION: 2, "gelu_tanh": 2},
        {ATTENTION: 2, "gelu_tanh": 2, "dropout, sum, layer_norm": 4, "dropout": 1},
        {ATTENTION: 2, "gelu_tanh": 2, "sum, layer_norm": 4},
    ),
    "LlamaModel": (
        LLAMA,
        rms := {
            ATTENTION: 2,
            "RMSNorm written out": 1,
            "sum, RMSNorm written out": 4,
            "linear, silu, times linear": 2,
        },
        rms,
        rms,
    ),
    "ViTModel": (
        VISION,
        {ATTENTION: 2, "linear, gelu": 2},
        {ATTENTION: 2, "linear, gelu": 2, "dropout, sum, layer_norm": 4, "dropout": 1},
        {ATTENTION: 2, "linear, gelu": 2, "sum, layer_norm": 4},
    ),
}


def made(name: str, dropout: float) -> nn.Module:
    options = dict(MODELS[name][0])
    known = build(name, options).config
    options |= {key: dropout for key in OFF if hasattr(known, key)}
    for key in ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout"):
        if key in options:  # whose draws are the kernels' own
            options[key] = 0.0
    return build(name, options)


def given(name: str) -> dict[str, torch.Tensor]:
    if name == "ViTModel":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    return {"input_ids": torch.randint(5, 99, (2, 12))}


def swapped() -> dict[str, int]:
    return dict(Counter(entry.before for entry in fastattn.compile_report().swapped))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_training(name, dropout, torchs_draws):  # noqa: F811
    stock = made(name, dropout).train()
    ours = copy.deepcopy(stock)
    x, outs = given(name), []
    for model in (torch.compile(ours, backend="fastattn"), stock):
        torch.manual_seed(1)
        outs.append(model(**x).last_hidden_state)
        outs[-1].square().sum().backward()
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    assert swapped() == MODELS[name][2 if dropout else 1]


@pytest.mark.parametrize("name", MODELS)
def test_evaluation(name):
    model, x = made(name, 0.3).eval(), given(name)
    with torch.no_grad():
        actual = torch.compile(model, backend="fastattn")(**x).last_hidden_state
        torch.testing.assert_close(actual, model(**x).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert swapped() == MODELS[name][3]
