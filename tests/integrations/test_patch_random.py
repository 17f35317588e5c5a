"""Random small models, with patch and without, side by side, before and after random edits."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastattn

pytestmark = pytest.mark.native

WIDTH, MODELS, SEEDS = 6, 50, 5
Edit = Callable[[nn.Module], object]


class Adapter(nn.Module):
    """Low-rank weights around a layer, as LoRA puts them."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Net(nn.Module):
    """A forward of its own with a branch, a side output and a second method."""

    def __init__(self, parts: list[nn.Module], taps: set[int], shared: nn.Linear) -> None:
        super().__init__()
        self.parts, self.shared = nn.ModuleList(parts), shared
        self.taps, self.early = taps, False

    def features(self, x: Tensor) -> Tensor:
        return self.shared(x)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, ...]:
        hidden = self.shared(x)
        out = [hidden]
        if extra is None:
            hidden = torch.relu(hidden)
        for i, part in enumerate(self.parts):
            hidden = part(hidden)
            if i in self.taps:
                out.append(hidden)
            if self.early and i == 1:
                break
        return (*out, hidden if extra is None else hidden + extra)


def part(rng: random.Random, shared: nn.Linear) -> nn.Module:
    kind = rng.randrange(10)
    if kind == 0:
        return nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True,
                                          norm_first=rng.random() < 0.5)  # fmt: skip
    if kind == 1:
        return Adapter(nn.Linear(WIDTH, WIDTH))
    layers: list[nn.Module] = []
    for _ in range(rng.randint(1, 4)):
        layers.append(shared if rng.random() < 0.15 else nn.Linear(WIDTH, WIDTH))
        layers += rng.choice([[nn.ReLU()]] * 4 + [[], [nn.GELU()], [nn.ReLU(True)], [nn.ReLU6()]])
        if rng.random() < 0.1:
            layers.append(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))
    return nn.Sequential(*layers)


def model(rng: random.Random) -> Net:
    torch.manual_seed(rng.randrange(2**31))
    shared = nn.Linear(WIDTH, WIDTH)
    parts = [part(rng, shared) for _ in range(rng.randint(1, 4))]
    taps = {i for i in range(len(parts)) if rng.random() < 0.3}
    return Net(parts, taps, shared).double()


def edit(rng: random.Random, net: nn.Module) -> Edit:
    """One change, to be made alike in two copies of ``net``."""
    names = [n for n, m in net.named_modules() if type(m) in (nn.Linear, nn.ReLU)]
    name, seed, kind = rng.choice(names), rng.randrange(2**31), rng.randrange(9)
    parent, _, child = name.rpartition(".")
    linear = isinstance(net.get_submodule(name), nn.Linear)
    if linear and tuple(net.get_submodule(name).weight.shape) != (WIDTH, WIDTH):
        kind = rng.choice((1, 3, 6, 7, 8))

    def apply(net: nn.Module) -> None:
        torch.manual_seed(seed)
        target, owner = net.get_submodule(name), net.get_submodule(parent)
        if kind == 0:
            setattr(owner, child, nn.Linear(WIDTH, WIDTH).double() if linear else nn.Tanh())
        elif kind == 1:
            target.register_forward_hook(lambda m, args, out: out - 0.5)
        elif kind == 2:
            target.register_forward_pre_hook(lambda m, args: (args[0] + 0.5,))
        elif kind == 3 and linear:
            parametrizations.weight_norm(target)
        elif kind == 4 and linear and "self_attn" not in name:
            setattr(owner, child, Adapter(target).double())
        elif kind == 5:
            target.forward = lambda x: 2 * x
        elif kind == 6:
            net.early = not net.early
        elif kind == 7 and linear:
            target.weight = nn.Parameter(target.weight.detach() * 2, requires_grad=False)
        elif kind == 8:
            net.train(not net.training)

    return apply


def everything(net: Net, x: Tensor) -> list[Tensor]:
    """What each way in gives, the outputs of every child alone, and the gradients."""
    net.zero_grad()
    outs = [net.features(x), *net(x), *net(x, x), *(part(x) for part in net.parts)]
    for part in net.parts:
        if isinstance(part, nn.Sequential):
            outs += [part[0](x), part[: len(part) // 2](x)]
    sum(out.square().sum() for out in outs).backward()
    return [*outs, *(p.grad for p in net.parameters() if p.grad is not None)]


def assert_same(ours: Net, stock: Net) -> None:
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    for actual, expected in zip(everything(ours, x), everything(stock, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def names(net: nn.Module) -> list[str]:
    """The classes; one that a parametrization makes is another one for each module."""
    return [type(m).__name__ for m in net.modules()]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_models(seed):
    rng, swapped = random.Random(seed), 0
    for _ in range(MODELS):
        stock = model(rng)
        ours = copy.deepcopy(stock)
        swapped += len(fastattn.patch(ours).swapped)
        assert_same(ours, stock)
        for _ in range(3):
            change = edit(rng, stock)
            change(stock)
            change(ours)
            assert_same(ours, stock)
        fastattn.patch(ours)
        assert_same(ours, stock)
        fastattn.unpatch(ours)
        assert names(ours) == names(stock)
        assert_same(ours, stock)
    assert swapped > MODELS
