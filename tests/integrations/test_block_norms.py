"""What patch makes of the RMSNorms of transformers and of Meta's Llama."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from block_calls import assert_same, spied
from torch import Tensor, nn

import fastattn

pytestmark = pytest.mark.native
HIDDEN = 24


class MetasNorm(nn.Module):
    """As Meta's Llama has it."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


NORMS = ("llama.LlamaRMSNorm", "olmo2.Olmo2RMSNorm", "t5.T5LayerNorm", "gemma.GemmaRMSNorm", "")
ROUNDINGS = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def norm(path: str, dtype: torch.dtype) -> nn.Module:
    kind = MetasNorm
    if path:
        pytest.importorskip("transformers")
        family, name = path.split(".")
        home = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        kind = getattr(home, name)
    module = kind(HIDDEN)
    nn.init.normal_(module.weight)
    return module.to(dtype)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    return spied(monkeypatch)


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("path", NORMS)
def test_norms(path, dtype, calls):
    stock = norm(path, dtype)
    x = torch.randn(6, 3, HIDDEN).to(dtype).requires_grad_()
    assert_same(stock, x, rtol=ROUNDINGS[dtype], atol=4 * ROUNDINGS[dtype])
    assert calls == ["dropout_add_norm"]


@pytest.mark.parametrize("path", NORMS)
def test_results_of_norms_are_as_near_to_the_formula(path):
    stock = norm(path, torch.bfloat16)
    x = torch.randn(64, HIDDEN).bfloat16()
    model = copy.deepcopy(stock)
    fastattn.patch(model)
    given, exact = stock(x), stock.float()(x.float())
    ours, theirs = ((r.float() - exact).abs().mean() for r in (model(x), given))
    assert ours <= theirs * 1.02
    assert (model(x) == given).float().mean() > 0.99  # rounded in the same order


@pytest.mark.parametrize("path", NORMS)
def test_what_else_norms_are_called_with(path):
    stock = norm(path, torch.float32)
    model = copy.deepcopy(stock)
    fastattn.patch(model)
    for edit in (None, "half", "double"):
        for m in (stock, model):
            if edit is not None:
                getattr(m, edit)()
        for given in (
            torch.randn(3, HIDDEN),
            torch.randn(3, HIDDEN).bfloat16(),
            torch.randn(3, HIDDEN).double(),
            torch.randn(4, HIDDEN, 5).transpose(1, 2),
            torch.randn(3, 1),
            torch.full((2, HIDDEN), 1e30),
            torch.tensor([float("inf"), float("nan")]).repeat(HIDDEN // 2),
            torch.randn(0, HIDDEN),
        ):
            expected, out = stock(given), model(given)
            assert out.dtype == expected.dtype
            if out.dtype == torch.float64:  # of numbers that were computed in float32
                out, expected = out.float(), expected.float()
            torch.testing.assert_close(out, expected, equal_nan=True)
    with pytest.raises(RuntimeError, match="must match the size"):
        model(torch.randn(3, 5))


def test_a_method_that_is_replaced_later(monkeypatch):
    model = norm("gemma.GemmaRMSNorm", torch.float32)
    fastattn.patch(model)
    x = torch.randn(3, HIDDEN)
    monkeypatch.setattr(type(model), "_norm", lambda self, x: 2 * x)
    torch.testing.assert_close(model(x), 2 * x * (1 + model.weight))


def test_a_norm_compiles():
    model = norm("llama.LlamaRMSNorm", torch.float32)
    x = torch.randn(3, HIDDEN)
    expected = model(x)
    fastattn.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
