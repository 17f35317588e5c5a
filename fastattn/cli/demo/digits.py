"""The digit classifier with three optimizers: stock torch and its patched copy on the same
batches."""

from __future__ import annotations

import argparse
import copy
import gzip
import statistics
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score, recall_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastattn

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}
COMPARED_STEPS = 20
LOSS_TOLERANCE = 1e-3  # over the first steps, in float32: later the trajectories may drift apart
WANTED_ACCURACY = 0.95


@dataclass
class DigitsResult:
    """One optimizer: metrics of [stock, fastattn] on held-out data, loss curves, speed."""

    data: str
    optimizer: str
    metrics: list[dict[str, float]]
    losses: list[list[float]]
    speedup: float
    good_accuracy: bool

    @property
    def loss_difference(self) -> float:
        pairs = zip(*(curve[:COMPARED_STEPS] for curve in self.losses), strict=True)
        return max(abs(a - b) for a, b in pairs)

    @property
    def good(self) -> bool:
        return self.good_accuracy and self.loss_difference <= LOSS_TOLERANCE

    def rows(self) -> list[tuple[str, ...]]:
        task = f"{self.data}, {self.optimizer}"
        check = f"first {COMPARED_STEPS} losses within {self.loss_difference:.0e}"
        check += "" if self.good else ": FAILED"
        stock, ours = ([f"{m[k]:.3f}" for k in ("accuracy", "recall", "f1")] for m in self.metrics)
        return [
            (task, "torch", *stock, "1.00x", ""),
            ("", "fastattn", *ours, f"{self.speedup:.2f}x a step", check),
        ]


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, plain or gzip."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes, got {raw[:4]!r}")
    dims = raw[3]
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims]) if len(raw) >= 4 + 4 * dims else ()
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape))
    if not shape or data.size != int(np.prod(shape)):
        raise ValueError(f"{path}: expected {int(np.prod(shape))} elements, got {data.size}")
    return data.reshape(shape)


def load_mnist(folder: Path) -> tuple[np.ndarray, ...]:
    def find(stem: str) -> np.ndarray:
        for name in (stem, stem.replace("-idx", ".idx")):
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    return read_idx(path)
        raise FileNotFoundError(f"--mnist: expected {stem} or {stem}.gz in {folder}")

    return (
        find("train-images-idx3-ubyte").astype(np.float32) / 255,
        find("t10k-images-idx3-ubyte").astype(np.float32) / 255,
        find("train-labels-idx1-ubyte").astype(np.int64),
        find("t10k-labels-idx1-ubyte").astype(np.int64),
    )


def load_data(mnist: Path | None, seed: int) -> tuple[str, tuple[Tensor, ...]]:
    """A name, and train images, test images, train labels, test labels."""
    if mnist is not None:
        return "MNIST 784-128-10", tuple(map(torch.from_numpy, load_mnist(mnist)))
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    split = train_test_split(
        images,
        digits.target.astype(np.int64),
        test_size=0.25,
        random_state=seed,
        stratify=digits.target,
    )
    return "digits 64-128-10", tuple(map(torch.from_numpy, split))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def _metrics(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    with torch.no_grad():
        predicted = model(x).argmax(1).numpy()
    return {
        "accuracy": accuracy_score(y, predicted),
        "recall": recall_score(y, predicted, average="macro", zero_division=0),
        "f1": f1_score(y, predicted, average="macro", zero_division=0),
    }


def run_digits(options: argparse.Namespace, console: Console) -> list[DigitsResult]:
    name, (train_x, test_x, train_y, test_y) = load_data(options.mnist, options.seed)
    steps = 400 if options.quick else 1000
    results = []
    with Progress(console=console, transient=True) as progress:
        for kind, build in OPTIMIZERS.items():
            torch.manual_seed(options.seed)
            stock = nn.Sequential(
                nn.Flatten(), nn.Linear(train_x[0].numel(), 128), nn.ReLU(), nn.Linear(128, 10)
            )
            models = [stock, copy.deepcopy(stock)]
            fastattn.patch(models[1])
            optimizers = [build(m.parameters()) for m in models]
            losses: list[list[float]] = [[], []]
            ratios = []
            batches = torch.Generator().manual_seed(options.seed)
            task = progress.add_task(f"{name}, {kind}", total=steps)
            for step in range(steps):
                rows = torch.randint(len(train_x), (64,), generator=batches)
                x, y = train_x[rows], train_y[rows]
                seconds = [0.0, 0.0]
                for which in (0, 1) if step % 2 == 0 else (1, 0):
                    start = time.perf_counter()
                    losses[which].append(_step(models[which], optimizers[which], x, y))
                    seconds[which] = time.perf_counter() - start
                ratios.append(seconds[0] / seconds[1])
                progress.advance(task)
            metrics = [_metrics(m, test_x, test_y) for m in models]
            reached = all(m["accuracy"] >= WANTED_ACCURACY for m in metrics)
            speedup = statistics.median(ratios[len(ratios) // 10 :])
            results.append(DigitsResult(name, kind, metrics, losses, speedup, reached))
    return results
