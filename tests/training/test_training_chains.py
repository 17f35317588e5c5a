"""Models that are no chain of linear layers and ReLUs: torch's loop runs, and says why."""

from __future__ import annotations

import linecache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import SGD
from training_models import IN, OUT, Functional, Pair, assert_torchs, sequential

pytestmark = pytest.mark.native


class Residual(Functional):
    def forward(self, x):
        x = F.relu(self.fc1(x))
        return self.fc2(x + x)


class InTraining(Functional):
    def forward(self, x):
        if self.training:
            x = x * 2
        return self.fc2(F.relu(self.fc1(x)))


class OfAnAttribute(Functional):
    width = IN

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x.view(-1, self.width))))


class Unused(Functional):
    def forward(self, x):
        y = self.fc1(x)
        z = self.fc1(x)  # noqa: F841
        return self.fc2(F.relu(y))


class Reused(Functional):
    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(IN, IN)

    def forward(self, x):
        return self.fc2(F.relu(self.fc2(x)))


class InPlace(Functional):
    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x), inplace=True))


class Before(Functional):
    def forward(self, x):
        return self.fc2(self.fc1(F.relu(x)))


class Default(Functional):
    def forward(self, x, scale=1.0):
        return self.fc2(F.relu(self.fc1(x)))


class Softmax(Functional):
    def forward(self, x):
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


class Kept(Functional):
    def forward(self, x):
        self.hidden = F.relu(self.fc1(x))
        return self.fc2(self.hidden)


class OwnCall(Functional):
    def __call__(self, x):
        return super().__call__(2 * x)


class OwnAttributes(Functional):
    def __getattr__(self, name):
        return super().__getattr__("fc1" if name == "fc1" else name)


class Hiding(Functional):
    @property
    def fc3(self):
        return self.fc2

    def forward(self, x):
        return self.fc3(F.relu(self.fc1(x)))


def decorated(forward):
    def doubled(self, x):
        return forward(self, 2 * x)

    return doubled


class Decorated(Functional):
    @decorated
    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


def without_source() -> nn.Module:
    names: dict = {"F": F, "Functional": Functional}
    code = "class Net(Functional):\n def forward(self, x): return self.fc2(F.relu(self.fc1(x)))"
    exec(code, names)
    return names["Net"]()


def of_another_source() -> nn.Module:
    """Its source is a chain, its code is not."""
    lines = "def forward(self, x):\n    return self.fc2(self.fc1({}x))\n"
    names: dict = {}
    exec(compile(lines.format("2 * "), "<changed>", "exec"), names)
    linecache.cache["<changed>"] = (0, None, lines.format("").splitlines(True), "<changed>")
    return type("Net", (Functional,), {"forward": names["forward"]})()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(IN, IN), nn.ReLU(), nn.Linear(IN, IN))
    model[2].weight = model[0].weight
    return model


def sharing() -> nn.Module:
    model = nn.Sequential(nn.Linear(IN, IN), nn.ReLU(), nn.Linear(IN, IN)).double()
    model[2].weight = nn.Parameter(model[0].weight.detach())
    return model


def of_a_subclass() -> nn.Module:
    class Mine(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    return nn.Sequential(Mine(IN, OUT))


CHAINS = {
    "a branch": (Residual, "`x + x`"),
    "training": (InTraining, "`if self.training:`"),
    "an attribute": (OfAnAttribute, "`x.view(-1, self.width)`"),
    "an unused value": (Unused, "`x`"),
    "a layer twice": (Reused, "fc2 is called twice"),
    "an option": (InPlace, "inplace=True"),
    "a ReLU first": (Before, "ReLU before the first linear layer"),
    "two inputs": (Default, "takes more than one input"),
    "another function": (Softmax, "log_softmax"),
    "a kept value": (Kept, "`self.hidden = "),
    "an own call": (OwnCall, "in a way of its own"),
    "own attributes": (OwnAttributes, "in a way of its own"),
    "a property": (Hiding, "has an attribute fc3 that is no child"),
    "a decorator": (Decorated, "`self`, which is no part"),
    "no source": (without_source, "source is not there"),
    "another source": (of_another_source, "is not what runs"),
    "tied weights": (tied, "parameters share memory"),
    "shared memory": (sharing, "parameters share memory"),
    "a subclass of Linear": (of_a_subclass, "0 (Mine): "),
    "another activation": (lambda: sequential(nn.GELU), "2 is GELU"),
    "dropout": (lambda: nn.Sequential(nn.Linear(IN, OUT), nn.Dropout(1.0)), "1 drops elements"),
    "no layer": (lambda: nn.Sequential(nn.Flatten(), nn.ReLU()), "ReLU before the first"),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(IN, OUT))), "0 is ",
    ),
    "old weight norm": (
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(IN, OUT))), "0 has hooks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_models_that_are_no_chain(name):
    make, reason = CHAINS[name]
    model = make()
    if name == "no layer":
        with pytest.raises(RuntimeError, match="does not require grad"):
            pair = Pair(model, lambda p: SGD([nn.Parameter(torch.ones(1))], lr=0.1))
            pair.step(*pair.batch())
        assert reason in pair.step.reason
        return
    pair = Pair(model)
    if name in ("tied weights", "shared memory"):  # a copy of a model does not share
        pair.twin = make().double()
        pair.twins_optimizer = SGD(pair.twin.parameters(), lr=0.1)
        pair.twin.load_state_dict(pair.model.state_dict())
    assert_torchs(pair, reason)
