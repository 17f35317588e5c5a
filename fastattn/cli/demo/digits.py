"""The digit classifier with three optimizers: stock torch, its patched copy, and the whole step in
one call, on the same batches."""

from __future__ import annotations

import argparse
import gzip
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastattn
from fastattn.cli.demo.compare import Run, Task, metrics_of, side_by_side
from fastattn.cli.memory import peak_bytes
from fastattn.training import TrainingStep

RUNS = ("torch", "fastattn.patch", "fastattn.training.TrainingStep")
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}
COMPARED_STEPS = 20
LOSS_TOLERANCE = 1e-3  # over the first steps, in float32: later the trajectories may drift apart
WANTED_ACCURACY = 0.95


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


Step = Callable[[tuple[Tensor, Tensor]], Tensor]


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """The loop that everybody writes."""

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss

    return step


def _native(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    step = TrainingStep(model, nn.CrossEntropyLoss(), optimizer)
    return lambda batch: step(*batch)


def _network(inputs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 10))


def run_digits(options: argparse.Namespace, console: Console) -> list[Task]:
    name, (train_x, test_x, train_y, test_y) = load_data(options.mnist, options.seed)
    steps = 400 if options.quick else 1000
    tasks = []
    with Progress(console=console, transient=True) as progress:
        for kind, build in OPTIMIZERS.items():
            models = [_network(train_x[0].numel(), options.seed) for _ in RUNS]
            fastattn.patch(models[1])
            optimizers = [build(m.parameters()) for m in models]
            runs = [Run(implementation) for implementation in RUNS]
            functions = [
                make(model, optimizer)
                for make, model, optimizer in zip(
                    (_plain, _plain, _native), models, optimizers, strict=True
                )
            ]
            bar = progress.add_task(f"{name}, {kind}", total=steps)

            def recorded(step: Step, run: Run) -> Step:
                def call(batch: tuple[Tensor, Tensor]) -> Tensor:
                    loss = step(batch)
                    run.losses.append(loss.item())
                    return loss

                return call

            def batches(bar: TaskID = bar) -> Iterator[tuple[Tensor, Tensor]]:
                generator = torch.Generator().manual_seed(options.seed)
                for _ in range(steps):
                    rows = torch.randint(len(train_x), (64,), generator=generator)
                    yield train_x[rows], train_y[rows]
                    progress.advance(bar)

            pairs = zip(functions, runs, strict=True)
            speeds = side_by_side([recorded(*pair) for pair in pairs], batches(), steps // 10)
            one = train_x[:64], train_y[:64]
            for run, model, step, speed in zip(runs, models, functions, speeds, strict=True):
                run.speed = speed
                with torch.no_grad():
                    run.metrics = metrics_of(test_y, model(test_x).argmax(1))
                _judge(run, runs[0])
                run.memory = peak_bytes(partial(step, one))
            tasks.append(Task(f"{name}, {kind}", runs))
    return tasks


def _judge(run: Run, stock: Run) -> None:
    pairs = zip(run.losses[:COMPARED_STEPS], stock.losses[:COMPARED_STEPS], strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    run.good = run.metrics["accuracy"] >= WANTED_ACCURACY and difference <= LOSS_TOLERANCE
    if run is not stock:
        run.check = f"first {COMPARED_STEPS} losses within {difference:.0e}"
