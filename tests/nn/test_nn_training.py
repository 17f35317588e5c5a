"""A training step of TransformerEncoderLayer, whose dropout, norms and activation are the
kernels'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.nn import TransformerEncoderLayer

pytestmark = pytest.mark.native
B, S, E, H, FF = 2, 6, 8, 2, 20


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


class _Plain(nn.TransformerEncoderLayer):
    """Torch's layer with the blocks of its training path, and dropout by given factors."""

    factors: dict[str, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        def dropped(name: str, y: Tensor) -> Tensor:
            return y * self.factors[name]

        def attended(y: Tensor) -> Tensor:
            return dropped("dropout1", self.self_attn(y, y, y, need_weights=False)[0])

        def fed(y: Tensor) -> Tensor:
            hidden = dropped("dropout", self.activation(self.linear1(y)))
            return dropped("dropout2", self.linear2(hidden))

        if self.norm_first:
            x = x + attended(self.norm1(x))
            return x + fed(self.norm2(x))
        x = self.norm1(x + attended(x))
        return self.norm2(x + fed(x))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "activation",
    [F.relu, F.gelu, nn.GELU("tanh"), nn.SiLU()],
    ids=["relu", "gelu", "gelu_tanh", "silu"],
)
def test_dropout_norms_and_activations_of_a_training_step(norm_first, activation):
    """The dropout of the kernels is the reference's for the seeds that they draw."""
    options = {"activation": activation, "norm_first": norm_first, "dtype": torch.float64}
    layer = TransformerEncoderLayer(E, H, FF, dropout=0.3, batch_first=True, **options)
    layer.self_attn.dropout = 0.0
    theirs = _Plain(E, H, FF, dropout=0.3, batch_first=True, **options)
    theirs.self_attn.dropout = 0.0
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(B, S, E, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(9)
    out = layer(x)
    torch.manual_seed(9)
    seeds = [torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64) for _ in range(3)]
    theirs.factors = {
        name: fastattn.reference.keep_factor(
            torch.empty(B, S, width, dtype=torch.float64), seed, 0.3
        )
        for name, seed, width in zip(
            ("dropout1", "dropout", "dropout2"), seeds, (E, FF, E), strict=True
        )
    }
    expected = theirs(x)
    close(out, expected)
    t = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, *layer.parameters()), t)
    wanted = torch.autograd.grad(expected, (x, *theirs.parameters()), t)
    for a, b in zip(found, wanted, strict=True):
        close(a, b)


def test_blocks_of_a_layers_own_are_called():
    layer = TransformerEncoderLayer(E, H, FF, dropout=0.3, batch_first=True)
    for name in ("_sa_block", "_ff_block"):
        seen = []
        whole = getattr(layer, name)
        setattr(layer, name, lambda *a, whole=whole, seen=seen: seen.append(1) or whole(*a))
        layer(torch.randn(B, S, E))
        assert seen == [1]
        delattr(layer, name)
