"""Patched encoders and attention mean what they meant, call by call and edit by edit."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import side_by_side
import torch
import torch.nn.functional as F
from side_by_side import Make, Run, assert_same, globally_hooked, operations, pair, twice_the_output
from torch import Tensor, fx, nn

import fastattn
from fastattn import nn as fnn

pytestmark = side_by_side.MARKS

# --- encoders -------------------------------------------------------------------------------------


@functools.cache
def batch() -> Tensor:
    """``[2, 5, 8]``"""
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


def encoder(**options) -> Make:
    def make() -> nn.Module:
        torch.manual_seed(5)
        options_ = {"dropout": 0.0, "batch_first": True, **options}
        layer = nn.TransformerEncoderLayer(8, 2, 16, **options_)
        model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return model

    return make


def trained(model: nn.Module, *args: object, **options: object) -> object:
    return model(*args, **options)


def inferred(model: nn.Module, *args: object, **options: object) -> object:
    with torch.no_grad():
        return model.eval()(*args, **options)


CALLS: dict[str, Callable[[Tensor], tuple[tuple, dict]]] = {
    "plain": lambda y: ((y,), {}),
    "padded": lambda y: ((y,), {"src_key_padding_mask": PADDED}),
    "causal": lambda y: ((y, CAUSAL), {}),
    "both": lambda y: ((y, CAUSAL, PADDED), {}),
    "hint": lambda y: ((y, CAUSAL), {"is_causal": True}),
    "hint without mask": lambda y: ((y,), {"is_causal": True}),
    "one for each head": lambda y: ((y, CAUSAL.expand(4, 5, 5)), {}),
    "float padding": lambda y: ((y,), {"src_key_padding_mask": -PADDED.float()}),
    "float mask": lambda y: ((y, -CAUSAL.float()), {}),
    "mixed masks": lambda y: ((y, -CAUSAL.float(), PADDED), {}),
    "integer mask": lambda y: ((y, CAUSAL.int()), {}),
    "mask of another shape": lambda y: ((y, CAUSAL[:3]), {}),
    "padding of another shape": lambda y: ((y, None, PADDED[:, :3]), {}),
    "unbatched": lambda y: ((y[0],), {}),
    "float64": lambda y: ((y.double(),), {}),
    "another width": lambda y: ((y[..., :4],), {}),
    "empty": lambda y: ((y[:0],), {}),
    "nested": lambda y: ((torch.nested.nested_tensor([y[0], y[1, :3]]),), {}),
    "meta": lambda y: ((y.to("meta"),), {}),
}
ENCODERS = {
    "relu": encoder(),
    "gelu, norm first": encoder(activation="gelu", norm_first=True),
    "nn.GELU('tanh')": encoder(activation=nn.GELU("tanh")),
    "nn.ReLU": encoder(activation=nn.ReLU()),
    "torch.relu": encoder(activation=torch.relu),
}


@pytest.mark.parametrize("run", [trained, inferred])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_calls(kind, call, run):
    args, options = CALLS[call](batch())
    if call == "meta":
        assert_same(ENCODERS[kind], lambda m: tuple(run(m, *args, **options).shape))
    else:
        assert_same(ENCODERS[kind], lambda m: run(m, *args, **options))


def each_layer(edit: Callable[[nn.Module], object]) -> Run:
    return lambda model: [edit(layer) for layer in model.layers]


class Takes(nn.Module):
    """Attention that adds its masks, as it may when torch's layer calls it."""

    batch_first, in_proj_bias, _qkv_same_embed_dim, num_heads = True, None, True, 2

    def forward(
        self, q, k, v, attn_mask=None, key_padding_mask=None, need_weights=False, is_causal=False
    ):
        scores = q @ k.transpose(1, 2)
        if attn_mask is not None:
            scores = scores + attn_mask
        if key_padding_mask is not None:
            scores = scores + key_padding_mask[:, None]
        return scores.softmax(-1) @ v, None


LAYER_EDITS = {
    "attention of another kind": each_layer(lambda m: setattr(m, "self_attn", Takes())),
    "another bias": each_layer(lambda m: setattr(m.linear1, "bias", nn.Parameter(torch.ones(16)))),
    "an adapter": each_layer(lambda m: setattr(m, "dropout2", nn.Linear(8, 8))),
    "a wrapped linear2": each_layer(lambda m: setattr(m, "linear2", nn.Sequential(m.linear2))),
    "a hook on attention": each_layer(
        lambda m: m.self_attn.register_forward_hook(lambda a, b, out: (2 * out[0], None))
    ),
    "a hook on linear1": each_layer(lambda m: twice_the_output(m.linear1)),
    "dropout kept on": each_layer(lambda m: m.dropout.__init__(1.0)),
    "no norm": lambda m: setattr(m, "norm", None),
    "frozen": lambda m: m.requires_grad_(False),
}  # fmt: skip


@pytest.mark.parametrize("call", ["plain", "padded", "both"])
@pytest.mark.parametrize("name", LAYER_EDITS)
def test_encoder_edits(name, call):
    args, options = CALLS[call](batch())
    assert_same(ENCODERS["relu"], lambda m: m(*args, **options), LAYER_EDITS[name])


def test_dropout_layers_switched_on_at_inference():
    def edit(model: nn.Module) -> None:
        for module in model.eval().modules():
            module.train(isinstance(module, nn.Dropout))

    def run(model: nn.Module) -> object:
        with torch.no_grad():
            return model(batch())

    assert_same(encoder(dropout=0.5), run, edit)


class PlainLayer(nn.TransformerEncoderLayer):
    """Adds its masks to the scores, and keeps what it was given."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        self.given = (src_mask, src_key_padding_mask)
        scores = src @ src.transpose(1, 2) + src_mask + src_key_padding_mask[:, None]
        return self.linear2(F.gelu(self.linear1(scores.softmax(-1) @ src)))


@pytest.mark.parametrize("make", [nn.TransformerEncoder, fnn.TransformerEncoder])
def test_a_layer_of_the_users_gets_float_masks(make):
    torch.manual_seed(0)
    model = make(PlainLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    stock = nn.TransformerEncoder(model.layers[0], 2, enable_nested_tensor=False)
    fastattn.patch(model)
    torch.testing.assert_close(model(batch(), CAUSAL, PADDED), stock(batch(), CAUSAL, PADDED))
    mask, padding = model.layers[1].given
    assert mask.dtype == padding.dtype == torch.float32
    assert torch.equal(mask == -torch.inf, CAUSAL)
    assert torch.equal(padding == -torch.inf, PADDED)


@pytest.mark.parametrize("run", [trained, inferred])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 6}])
def test_attention_calls(options, run):
    def make() -> nn.Module:
        torch.manual_seed(2)
        return nn.MultiheadAttention(8, 2, batch_first=True, **options)

    k, v = torch.ones(2, 5, options.get("kdim", 8)).cumsum(1), torch.randn(2, 5, 8)
    calls = [
        ((batch(), k, v), {}),
        ((batch(), k, v), {"need_weights": False}),
        ((batch(), k, v), {"average_attn_weights": False}),
        ((batch(), k, v), {"is_causal": True}),
        ((batch(), k, v), {"is_causal": True, "attn_mask": CAUSAL, "need_weights": False}),
        ((batch(), k[:, :4], v), {}),
        ((batch()[None], k, v), {}),
        ((batch(), k, None), {}),
        ((batch(), k, v), {"key_padding_mask": PADDED.int()}),
        ((batch(), k, v), {"key_padding_mask": PADDED, "attn_mask": -CAUSAL.float()}),
    ]
    for args, call in calls:
        assert_same(make, lambda m, args=args, call=call: run(m, *args, **call))


ENCODER_TOOLS = {
    "hooks for all modules": lambda m: globally_hooked(nn.Sequential(m), batch()),
    "fx": lambda m: operations(fx.symbolic_trace(nn.Sequential(m)).graph),
    "export": lambda m: operations(torch.export.export(m.eval(), (batch(),)).graph),
    "jit.trace": lambda m: torch.jit.trace(m.eval(), batch(), check_trace=False)(batch()),
    "jit.script": lambda m: torch.jit.script(m.eval())(batch()),
}


@pytest.mark.parametrize("name", ENCODER_TOOLS)
def test_encoder_tools(name):
    assert_same(ENCODERS["relu"], ENCODER_TOOLS[name])


def test_scripting_leaves_a_model_that_runs_and_can_be_unpatched():
    stock, ours = pair(ENCODERS["relu"])
    torch.jit.script(ours)
    torch.testing.assert_close(ours(batch()), stock(batch()))
    fastattn.unpatch(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
