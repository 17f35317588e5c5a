"""nn.TransformerEncoder without its padding: at every token what the padded batch gives."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fastattn
from fastattn import backends
from fastattn.backends import FastAttnWarning
from fastattn.nn import TransformerEncoder, TransformerEncoderLayer

pytestmark = pytest.mark.native
PADDING = torch.arange(7) >= torch.tensor([[7], [3], [1], [5]])


@pytest.fixture(autouse=True)
def unwarned() -> None:
    backends._warned.clear()


def encoder(kind=nn.TransformerEncoder, layer=nn.TransformerEncoderLayer, norm=True, **options):
    torch.manual_seed(0)
    of_layer = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64, **options}
    own = {"unpad": True} if kind is TransformerEncoder else {"enable_nested_tensor": False}
    last = nn.LayerNorm(16, dtype=torch.float64) if norm else None
    made = kind(layer(16, 4, 24, **of_layer), 2, last, **own)
    for i, p in enumerate(made.parameters()):
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
    return made


def batch(first: bool = True) -> Tensor:
    x = torch.randn(4, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x if first else x.transpose(0, 1).contiguous()


CALLS = list(itertools.product([False, True], [False, True], [False, True], ["relu", "gelu"]))


@pytest.mark.parametrize("norm_first, first, causal, activation", CALLS)
def test_outputs_and_gradients(norm_first, first, causal, activation):
    options = {"norm_first": norm_first, "batch_first": first, "activation": activation}
    stock = encoder(**options).train()
    ours = copy.deepcopy(stock)
    fastattn.patch(ours, unpad=True)
    built = encoder(TransformerEncoder, TransformerEncoderLayer, **options).train()
    mask = nn.Transformer.generate_square_subsequent_mask(7) < 0 if causal else None
    tokens = ~PADDING if first else ~PADDING.T
    results = []
    for model in (stock, ours, built):
        x = batch(first).requires_grad_()
        out = model(x, mask, src_key_padding_mask=PADDING)
        out[tokens].square().sum().backward()
        results.append((out, x.grad, [p.grad for p in model.parameters()]))
    for out, grad, grads in results[1:]:
        assert_close(out[tokens], results[0][0][tokens])
        assert (out[~tokens] == 0).all()
        assert_close(grad[tokens], results[0][1][tokens])
        assert_close(grads, results[0][2])


def test_at_inference_torchs_nested_path_is_not_taken():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2).eval()
    ours = copy.deepcopy(stock)
    fastattn.patch(ours, unpad=True)
    longest = PADDING.clone()
    longest[:, 6] = True  # torch's result is as long as the longest sequence
    with torch.no_grad():
        out = ours(batch().float(), src_key_padding_mask=longest)
        expected = stock(batch().float(), src_key_padding_mask=longest)
    assert out.shape == (4, 7, 16)
    assert_close(out[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-4)


def test_dropout_repeats_with_the_seed():
    ours = encoder(dropout=0.3).float().train()
    fastattn.patch(ours, unpad=True)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(ours(batch().float(), src_key_padding_mask=PADDING))
    assert_close(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])
    assert (outs[0][PADDING] == 0).all()


class Roll(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(1, -2))


def rolled(model: nn.Module) -> None:
    model.layers[0].linear1.__class__ = Roll


def hooked(model: nn.Module) -> None:
    model.layers[1].norm1.register_forward_hook(lambda *given: None)


def biased(model: nn.Module) -> None:
    attention = model.layers[0].self_attn
    attention.bias_k = nn.Parameter(torch.ones(1, 1, 16, dtype=torch.float64))
    attention.bias_v = nn.Parameter(torch.ones(1, 1, 16, dtype=torch.float64))


@pytest.mark.parametrize(
    "edit, reason",
    [(rolled, "Roll is not known"), (hooked, "LayerNorm has hooks"),
     (biased, "options that packed sequences do not have")],
)  # fmt: skip
def test_an_encoder_that_cannot_runs_padded(edit, reason):
    stock = encoder().train()
    ours = copy.deepcopy(stock)
    fastattn.patch(ours, unpad=True)
    edit(stock)
    edit(ours)
    with pytest.warns(FastAttnWarning, match=f"TransformerEncoder runs padded: .*{reason}"):
        out = ours(batch(), src_key_padding_mask=PADDING)
    expected = stock(batch(), src_key_padding_mask=PADDING)
    assert_close(out[~PADDING], expected[~PADDING])


def test_masks_that_are_not_padding_run_padded():
    stock = encoder().train()
    ours = copy.deepcopy(stock)
    fastattn.patch(ours, unpad=True)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(7, 7, generator=generator) < 0.3
    mask[:, 0] = False
    added = torch.zeros(4, 7, dtype=torch.float64).masked_fill(PADDING, -1e4)
    with pytest.warns(FastAttnWarning, match="mask is not the causal one"):
        out = ours(batch(), mask, src_key_padding_mask=PADDING)
    assert_close(out[~PADDING], stock(batch(), mask, src_key_padding_mask=PADDING)[~PADDING])
    with pytest.warns(FastAttnWarning, match="src_key_padding_mask is not bool"):
        out = ours(batch(), src_key_padding_mask=added)
    assert_close(out[~PADDING], stock(batch(), src_key_padding_mask=added)[~PADDING])
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        ours(batch(), src_key_padding_mask=PADDING[:, :5])


def test_unpatch_pads_again():
    ours = encoder().train()
    fastattn.patch(ours, unpad=True)
    assert (ours(batch(), src_key_padding_mask=PADDING)[PADDING] == 0).all()
    fastattn.unpatch(ours)
    fastattn.patch(ours)
    assert not (ours(batch(), src_key_padding_mask=PADDING)[PADDING] == 0).all()


def test_the_hint_without_a_mask_is_refused_as_by_torch():
    stock = encoder().train()
    ours = copy.deepcopy(stock)
    fastattn.patch(ours, unpad=True)
    errors = []
    for model in (stock, ours):
        with pytest.raises(RuntimeError) as caught:
            model(batch(), None, src_key_padding_mask=PADDING, is_causal=True)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.filterwarnings("ignore:unpad", "ignore:The PyTorch API of nested tensors")
def test_where_it_cannot_at_inference_torchs_nested_path_runs():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2).eval()
    ours = copy.deepcopy(stock)
    fastattn.patch(ours, unpad=True)
    for model in (stock, ours):
        model.layers[1].norm1.register_forward_hook(lambda *given: None)
    with torch.no_grad():
        out, expected = (m(batch().float(), src_key_padding_mask=PADDING) for m in (ours, stock))
    assert_close(out[~PADDING], expected[~PADDING], rtol=1e-4, atol=1e-4)
    assert bool((out[PADDING] == 0).all()) == bool((expected[PADDING] == 0).all())
