"""LinearActivation, GatedMLP and MLP with any activation and dropout, against torch.nn's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.nn import MLP, GatedMLP, LinearActivation

pytestmark = pytest.mark.native
NAMES = ("relu", "gelu", "gelu_tanh", "silu", "relu2", "quick_gelu")
MODULES = {"relu": nn.ReLU, "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"), "silu": nn.SiLU}


def activated(name: str | None, z: Tensor) -> Tensor:
    return fastattn.reference.activation(name)(z)


def close(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def called(monkeypatch, *names: str) -> list[str]:
    """The user's functions that modules call from now on."""
    seen: list[str] = []
    for name in names:
        whole = getattr(fastattn.functional, name)
        monkeypatch.setattr(
            fastattn.functional,
            name,
            lambda *a, name=name, whole=whole, **o: seen.append(name) or whole(*a, **o),
        )
    return seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_activation(name, bias):
    layer = LinearActivation(6, 5, name, bias=bias, dtype=torch.float64)
    theirs = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    theirs.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), activated(name, theirs(x))
    close(out, expected)
    t = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, *layer.parameters()), t)
    close(found, torch.autograd.grad(expected, (x, *theirs.parameters()), t))
    close(torch.jit.script(layer)(x), out)
    close(torch.jit.trace(layer, x)(x), out)
    assert repr(layer) == (
        f"LinearActivation(in_features=6, out_features=5, bias={bias}, activation={name!r}, p=0.0)"
    )


def test_linear_activation_drops_in_training_alone():
    layer, x = LinearActivation(6, 500, "gelu", p=0.3), torch.randn(4, 6)
    out, expected = layer(x), F.gelu(F.linear(x, layer.weight, layer.bias))
    kept = out != 0
    assert 0.6 < kept.float().mean() < 0.8
    torch.testing.assert_close(out[kept], expected[kept] / 0.7)
    torch.testing.assert_close(layer.eval()(x), expected)
    copied = copy.deepcopy(layer)
    assert copied.p == 0.3
    assert copied.activation == "gelu"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LinearActivation(2, 3, "elu"), "activation: expected one of 'relu', 'gelu', "),
        (lambda: LinearActivation(2, 3, None), "activation: expected one of 'relu'"),
        (lambda: LinearActivation(2, 3, p=2.0), r"p: expected a probability in \[0, 1\], got 2.0"),
        (lambda: GatedMLP(2, 3, activation="elu"), "activation: expected one of None, 'relu'"),
        (lambda: MLP(2, 3, 4, activation="relu2"), "activation: expected one of 'relu', 'gelu'"),
        (lambda: MLP(2, 3, 4, p=-1.0), r"p: expected a probability in \[0, 1\], got -1.0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class _Llama(nn.Module):
    """The block as Hugging Face's Llama writes it."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias, dtype=torch.float64)
        self.up_proj = nn.Linear(width, hidden, bias, dtype=torch.float64)
        self.down_proj = nn.Linear(hidden, width, bias, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("bias", [True, False])
def test_gated_mlp(bias, monkeypatch):
    seen = called(monkeypatch, "gated_mlp")
    block, theirs = GatedMLP(6, 9, bias=bias, dtype=torch.float64), _Llama(6, 9, bias)
    theirs.load_state_dict(block.state_dict(), strict=True)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    out, expected, t = block(x), theirs(x), torch.randn(2, 3, 6, dtype=torch.float64)
    close(out, expected)
    found = torch.autograd.grad(out, (x, *block.parameters()), t)
    close(found, torch.autograd.grad(expected, (x, *theirs.parameters()), t))
    assert seen == ["gated_mlp"]
    hooked = []
    block.up_proj.register_forward_hook(lambda *_: hooked.append("hook"))
    close(block(x), expected)
    assert (seen, hooked) == (["gated_mlp"], ["hook"])
    assert GatedMLP(6, 9, 4)(torch.randn(2, 6)).shape == (2, 4)
    for name in (None, *NAMES):
        block = GatedMLP(6, 9, activation=name, dtype=torch.float64)
        expected = activated(name, block.gate_proj(x)) * block.up_proj(x)
        close(block(x), block.down_proj(expected))
    close(torch.jit.trace(block, x)(x), block(x))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_mlp(name, p, monkeypatch):
    seen = called(monkeypatch, "mlp", "linear")
    network = MLP(6, [9, 8], 3, dtype=torch.float64, activation=name, p=p)
    between = [MODULES[name](), *([nn.Dropout(p)] if p else [])]
    theirs = nn.Sequential(
        nn.Linear(6, 9), *between, nn.Linear(9, 8), *between, nn.Linear(8, 3)
    ).double()
    assert [type(m) for m in network] == [type(m) for m in theirs]
    theirs.load_state_dict(network.state_dict(), strict=True)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    network.eval(), theirs.eval()
    out, expected, t = network(x), theirs(x), torch.randn(4, 3, dtype=torch.float64)
    close(out, expected)
    found = torch.autograd.grad(out, (x, *network.parameters()), t)
    close(found, torch.autograd.grad(expected, (x, *theirs.parameters()), t))
    assert seen == (["mlp"] if name == "relu" else ["linear"] * 3)
    seen.clear()
    network.train()(x)
    assert seen == (["mlp"] if name == "relu" and p == 0.0 else ["linear"] * 3)
    assert MLP.fits(theirs)
    shared = MLP.from_sequential(theirs)
    close(shared(x), expected)
    seen.clear()
    theirs[1].register_forward_hook(lambda *_: None)
    assert not MLP.fits(theirs)
    close(shared(x), expected)
    assert not seen


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(4, 4), nn.Dropout(), nn.ReLU(), nn.Linear(4, 4)],
        [nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.Dropout(), nn.Linear(4, 4)],
        [nn.Linear(4, 4), nn.ReLU(), nn.GELU(), nn.Linear(4, 4)],
        [nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)],
        [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()],
        [nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)],
        [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)],
        [nn.Linear(4, 4)],
        [],
    ],
    ids=lambda layers: "-".join(type(m).__name__ for m in layers),
)
def test_stacks_that_are_no_mlp(layers):
    assert not MLP.fits(nn.Sequential(*layers))
    with pytest.raises(ValueError, match="sequential: expected Linear, activation"):
        MLP.from_sequential(nn.Sequential(*layers))


def test_a_mixed_stack():
    layers = [nn.Linear(4, 5), nn.GELU(), nn.Dropout(0.0), nn.Linear(5, 6), nn.SiLU(),
              nn.Linear(6, 2)]  # fmt: skip
    stack = nn.Sequential(*layers).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    close(MLP.from_sequential(stack)(x), stack(x))
