"""Models of the tests of ``TrainingStep``, and torch's loop beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.training import TrainingStep

IN, HIDDEN, OUT, ROWS = 12, 9, 5, 8


class Functional(nn.Module):
    """The ``Net`` of many a tutorial."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(IN, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, OUT)

    def forward(self, x):
        """Classifies images."""
        x = x.view(-1, 12)
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        return x


class Layers(Functional):
    """Its children are called one by one."""

    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        flat = self.flatten(images)
        hidden = self.relu(self.fc1(flat))
        return self.fc2(hidden)


class Quickstart(nn.Module):
    """A stack within a module."""

    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            nn.Linear(IN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, OUT),
        )  # fmt: skip

    def forward(self, x):
        x = self.flatten(x)
        logits = self.linear_relu_stack(x)
        return logits


class Methods(Functional):
    """Methods of tensors, and rows by number."""

    def forward(self, x):
        return self.fc2(self.fc1(x.reshape(x.size(0), -1)).relu())


class Torchs(Functional):
    """Functions of torch, and a shape."""

    def forward(self, x):
        x = torch.flatten(x, 1)
        x = x.view(x.shape[0], -1)
        return self.fc2(torch.relu(self.fc1(torch.flatten(x, start_dim=1))))


class Outer(nn.Module):
    """A module of one's own in another, and what does nothing."""

    def __init__(self):
        super().__init__()
        self.inner, self.nothing, self.dropout = Functional(), nn.Identity(), nn.Dropout(0.0)

    def forward(self, x):
        return self.dropout(self.nothing(self.inner(x)))


def sequential(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Flatten, Linear, ReLU, Linear."""
    return nn.Sequential(nn.Flatten(), nn.Linear(IN, HIDDEN), activation(), nn.Linear(HIDDEN, OUT))


def patched() -> nn.Module:
    model = sequential()
    fastattn.patch(model)
    return model


def without_bias() -> nn.Module:
    return nn.Sequential(
        nn.Linear(IN, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, OUT, bias=False)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Functional": Functional,
    "Layers": Layers,
    "Quickstart": Quickstart,
    "Methods": Methods,
    "Torchs": Torchs,
    "Outer": Outer,
    "Sequential": sequential,
    "patched": patched,
    "without bias": without_bias,
    "MLP": lambda: fastattn.nn.MLP(IN, [HIDDEN, 7], OUT),
    "LinearReLU": lambda: nn.Sequential(
        fastattn.nn.LinearReLU(IN, HIDDEN), fastattn.nn.Linear(HIDDEN, OUT)
    ),
    "one layer": lambda: nn.Linear(IN, OUT),
    "two in a row": lambda: nn.Sequential(nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)),
}


class Pair:
    """A training by ``TrainingStep``, and torch's loop on a copy of all that it has."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        loss: Any = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.model, self.twin = model.to(dtype), copy.deepcopy(model).to(dtype)
        make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1))
        self.optimizer = make(self.model.parameters())
        self.twins_optimizer = make(self.twin.parameters())
        self.step = TrainingStep(self.model, self.loss, self.optimizer)
        self.dtype = dtype

    def batch(self, rows: int = ROWS) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, IN, dtype=self.dtype), torch.randint(OUT, (rows,))

    def torchs(self, x: Tensor, labels: Tensor) -> Tensor:
        self.twins_optimizer.zero_grad()
        loss = self.loss(self.twin(x), labels)
        loss.backward()
        self.twins_optimizer.step()
        self.twins_optimizer.zero_grad()
        return loss.detach()

    def train(self, steps: int = 1, **close: float) -> None:
        """Both by ``steps``; their losses and all that they have must agree."""
        close = close or {"rtol": 1e-10, "atol": 1e-12}
        for _ in range(steps):
            x, labels = self.batch()
            torch.testing.assert_close(self.step(x, labels), self.torchs(x, labels), **close)
        self.compare(**close)

    def compare(self, **close: float) -> None:
        updated = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for ours, torchs in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(ours, torchs, **close)
            assert ours.grad is None or id(ours) not in updated
            kept = self.optimizer.state.get(ours, {})
            expected = self.twins_optimizer.state.get(torchs, {})
            assert list(kept) == list(expected)
            for name, value in expected.items():
                if isinstance(value, Tensor):
                    torch.testing.assert_close(kept[name], value, **close)
                else:
                    assert kept[name] == value


# Of the same operations on the same numbers at other addresses.
SAME = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_torchs(pair: Pair, reason: str) -> None:
    """Torch's loop runs."""
    close = SAME[pair.dtype]
    pair.train(2, rtol=close, atol=close)
    assert pair.step.reason is not None
    assert reason in pair.step.reason, pair.step.reason


def halved(optimizer, *args) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data.mul_(0.5)
