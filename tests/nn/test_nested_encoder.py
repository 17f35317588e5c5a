"""Encoders that make a nested tensor at inference: torch's, ours and patched ones, with torch's and
our layers, give at every token what torch gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import fastattn

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


class OwnEncoder(nn.TransformerEncoder):
    pass


class OwnLayer(nn.TransformerEncoderLayer):
    """Its forward never takes torch's fast path, so that its parts are given the nested tensor."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        if self.norm_first:
            x = self.norm1(src)
            src = src + self._sa_block(x, src_mask, src_key_padding_mask, is_causal)
            return src + self._ff_block(self.norm2(src))
        attended = self._sa_block(src, src_mask, src_key_padding_mask, is_causal)
        src = self.norm1(src + attended)
        return self.norm2(src + self._ff_block(src))


class OwnOurs(fastattn.nn.TransformerEncoderLayer):
    forward = OwnLayer.forward


ENCODERS = {
    "torch's": nn.TransformerEncoder,
    "ours": fastattn.nn.TransformerEncoder,
    "subclass": OwnEncoder,
}
LAYERS = {
    "torch's": nn.TransformerEncoderLayer,
    "ours": fastattn.nn.TransformerEncoderLayer,
    "subclass": OwnLayer,
    "subclass of ours": OwnOurs,
}
PADDING = torch.tensor([[0] * 6, [0] * 4 + [1] * 2, [0] * 3 + [1] * 3]).bool()


def build(encoder, layer, nested, norm_first, batch_first) -> nn.Module:
    torch.manual_seed(0)
    one = layer(16, 4, 32, dropout=0.0, norm_first=norm_first, batch_first=batch_first)
    return encoder(one, 2, enable_nested_tensor=nested)


def run(model, padding, train, grad, batch_first, hook) -> torch.Tensor:
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
    model.train(train)
    # A hook sends a layer's call past torch's fast path, after the encoder has made a nested one.
    handle = model.layers[0].linear2.register_forward_hook(lambda *_: None) if hook else None
    with torch.set_grad_enabled(grad):
        out = model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=padding)
    if handle is not None:
        handle.remove()
    return out if batch_first else out.transpose(0, 1)


@pytest.mark.parametrize("patched", [False, True], ids=["", "patched"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_combination(encoder, layer, patched):
    for flags in itertools.product([True, False], repeat=3):  # nested, norm_first, batch_first
        model = build(ENCODERS[encoder], LAYERS[layer], *flags)
        torchs = build(nn.TransformerEncoder, nn.TransformerEncoderLayer, *flags)
        if patched:
            fastattn.patch(model)
        hooks = (False, True) if flags[0] else (False,)
        for train, grad, hook in itertools.product((False, True), (False, True), hooks):
            for padding in (None, PADDING):
                call = (padding, train, grad, flags[2], hook)
                out, expected = run(model, *call), run(torchs, *call)
                tokens = ... if padding is None else ~padding
                torch.testing.assert_close(out[tokens], expected[tokens], rtol=1e-5, atol=1e-5)
                if patched and ENCODERS[encoder] is not fastattn.nn.TransformerEncoder:
                    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_nested_tensor_reaches_our_layers():
    model = build(nn.TransformerEncoder, OwnOurs, True, False, True).eval()
    seen = []
    model.layers[1].linear2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, PADDING, False, False, True, False)
    assert [x.is_nested for x in seen] == [True]
