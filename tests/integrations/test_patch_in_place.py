"""What is saved for the backward with patch and without: tensors that change in place before it,
frozen layers, the order of the result in memory."""

from __future__ import annotations

import pytest
import side_by_side
import torch
from patched_models import MODELS, batch, gradients, gradients_in_a_batch, loss, stack
from side_by_side import assert_same, compare, outcome, pair
from torch import Tensor, nn

pytestmark = side_by_side.MARKS


def frozen(model: nn.Module) -> Tensor:
    model.requires_grad_(False)
    x = batch().clone().requires_grad_()
    hidden = x * 1.0
    out = model(hidden)
    hidden += 1
    (loss(out) + hidden.sum()).backward()
    return x.grad


def biases_alone(model: nn.Module) -> object:
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    x = batch().clone()
    out = model(x)
    x.zero_()
    loss(out).backward()
    return gradients(model)


def added_in_place(model: nn.Module) -> Tensor:
    x = batch().clone().requires_grad_()
    hidden = x * 1.0
    hidden += model(hidden)
    loss(hidden).backward()
    return x.grad


@pytest.mark.parametrize("run", [frozen, biases_alone, added_in_place])
@pytest.mark.parametrize("model", MODELS)
def test_what_torch_does_not_save_may_change(model, run):
    assert_same(MODELS[model], run)


@pytest.mark.parametrize("relu_last", [False, True])
def test_derivatives_through_frozen_layers(relu_last):
    """No input is saved for these."""

    def make() -> nn.Module:
        return nn.Sequential(*stack(), *([nn.ReLU()] if relu_last else [])).double()

    def run(model: nn.Module) -> object:
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias"))
        x = batch().double().requires_grad_()
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        first = torch.autograd.grad(model(x).sin().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        return (*first, *second, gradients_in_a_batch(model.float()))

    stock, ours = pair(make)
    actual, expected = outcome(run, ours), outcome(run, stock)
    assert not isinstance(expected, Exception), expected
    compare(actual, expected)


FROZEN = {"nothing": "none", "the projections": "attention.in_proj", "everything": ""}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("frozen", FROZEN)
def test_a_dropout_behind_attention_draws_the_same(train, frozen):
    """It draws in the order in which the attention's result lies in memory."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True).train(train)
            self.dropout = nn.Dropout(0.5)
            for name, p in self.named_parameters():
                p.requires_grad_(not name.startswith(FROZEN[frozen]))

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.attention(x, x, x)[0])

    def run(model: nn.Module) -> object:
        torch.manual_seed(0)
        return model(torch.randn(3, 5, 8))

    assert_same(Net, run, dropout=False)
