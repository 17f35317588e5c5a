"""Dropout of patched models: whose numbers it draws, with ``dropout=False`` and without."""

from __future__ import annotations

import copy
import pickle

import pytest
import side_by_side
import torch
from side_by_side import assert_same
from torch import Tensor, nn

import fastattn
from fastattn import nn as fnn
from fastattn.functional import _served
from fastattn.nn._plain import TORCHS_DRAWS

pytestmark = side_by_side.MARKS


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(_served, "LEAST_DROPOUT", 1)


class Drops(nn.Dropout):
    pass


class Net(nn.Module):
    """Dropouts of all kinds, one of them behind attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, 0.3, batch_first=True)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.drop, self.nothing, self.in_place = nn.Dropout(0.3), nn.Dropout(0.0), Drops(0.3)
        self.over = nn.Dropout(0.3, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention(x, x, x)[0] + self.attention(x, x, x, need_weights=False)[0]
        x = self.drop(attended) + self.nothing(x)
        return self.over(self.in_place(self.encoder(x)) + 1)


def run(model: nn.Module) -> object:
    torch.manual_seed(4)
    x = torch.randn(3, 5, 8, requires_grad=True)
    out = model(x)
    return (out, *torch.autograd.grad(out.sin().sum(), (x, *model.parameters())))


@pytest.mark.parametrize("frozen", [False, True])
def test_torchs_draws(frozen):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Net()

    if not frozen:
        assert_same(make, run, dropout=False)
    else:
        assert_same(make, lambda m: m.requires_grad_(False)(torch.ones(3, 5, 8)), dropout=False)


def test_which_dropouts_are_swapped():
    model = Net()
    report = fastattn.patch(model)
    assert "drop" in [e.name for e in report.swapped if e.after == "fastattn Dropout"]
    assert type(model.drop) is fnn.Dropout
    assert [type(m) for m in (model.nothing, model.over)] == [nn.Dropout] * 2
    assert type(model.in_place) is Drops
    assert fastattn.unpatch(model).swapped
    assert type(model.drop) is nn.Dropout


def test_a_seed_gives_one_result_and_another_than_torchs():
    torch.manual_seed(0)
    stock = Net()
    model = copy.deepcopy(stock)
    fastattn.patch(model)
    torch.testing.assert_close(run(model), run(model), rtol=0, atol=0)
    torch.testing.assert_close(run(copy.deepcopy(model)), run(model), rtol=0, atol=0)
    assert not torch.equal(run(model)[0], run(stock)[0])
    torch.testing.assert_close(model.eval()(torch.ones(3, 5, 8)), stock.eval()(torch.ones(3, 5, 8)))
    fastattn.unpatch(model)
    assert all(
        torch.equal(*pair) for pair in zip(run(model.train()), run(stock.train()), strict=True)
    )


def test_the_mark_of_torchs_draws():
    model = Net()
    expected = run(model)
    fastattn.patch(model, dropout=False)
    assert TORCHS_DRAWS in vars(model.encoder.layers[0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(run(twin), expected, rtol=1e-4, atol=1e-5)
    fastattn.unpatch(model)
    assert not any(TORCHS_DRAWS in vars(m) for m in model.modules())


def test_a_wrong_type():
    for function in (fastattn.patch, fastattn.plan):
        with pytest.raises(TypeError, match="dropout: expected a bool, got float"):
            function(nn.Dropout(0.5), dropout=0.1)
    with pytest.raises(TypeError, match="dropout: expected a bool, got NoneType"):
        fastattn.patch(nn.Dropout(0.5), dropout=None)


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model", "DistilBertModel", "ViTModel"])
def test_models_of_transformers(name):
    """Their attention drops weights too, within transformers' interface."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
    small |= {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    small |= {"intermediate_size": 24, "attn_pdrop": 0.3, "resid_pdrop": 0.3, "dropout": 0.3}
    small |= {"attention_dropout": 0.3, "image_size": 8, "patch_size": 4, "hidden_dim": 24}
    small |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    stock = kind(kind.config_class(**small, attn_implementation="sdpa")).train()
    given = torch.randn(3, 3, 8, 8) if name == "ViTModel" else torch.tensor([[1, 2, 3, 4]] * 3)
    results = []
    for options in ({"dropout": False}, {"dropout": True}, None):
        model = copy.deepcopy(stock)
        if options is not None:
            report = fastattn.patch(model, **options)
            assert "fastattn attention" in [e.after for e in report.swapped]
        for _ in range(2):
            torch.manual_seed(1)
            out = model(given)[0]
            loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
            results.append((out, *torch.autograd.grad(loss, list(model.parameters()),
                                                      allow_unused=True)))  # fmt: skip
    torch.testing.assert_close(results[0], results[4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[2][0], results[4][0])
    assert torch.equal(results[2][0], results[3][0])
    fastattn.patch(model, dropout=False)
    assert any(TORCHS_DRAWS in vars(m) for m in model.modules())
    fastattn.unpatch(model)
    assert not any(TORCHS_DRAWS in vars(m) for m in model.modules())
