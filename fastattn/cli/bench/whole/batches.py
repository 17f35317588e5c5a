"""Batches of random words or pixels. Sentences are as long as real ones are: few are long."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.cli.bench.whole.models import CLASSES, Model


@dataclass(frozen=True)
class Batch:
    """What a model is called with; ``labels`` in training alone."""

    inputs: dict[str, Tensor]
    labels: Tensor
    tokens: Tensor | None  # bool [batch, seq]; None: all


def lengths_of(batch: int, seq: int, fill: float) -> tuple[int, ...]:
    """``batch`` lengths of 1 to ``seq`` tokens, the longest ``seq``, which together make the share
    ``fill`` of the batch: a log-normal distribution (sigma 0.6), scaled until the sum is right.

    Raises:
        ValueError: ``fill`` is not in reach.
    """
    wanted = round(fill * batch * seq)
    if not seq + batch - 1 <= wanted <= batch * seq:
        raise ValueError(
            f"fill: expected {(seq + batch - 1) / (batch * seq):.2f} to 1 for a batch of "
            f"{batch}x{seq}, got {fill}"
        )
    drawn = torch.randn(batch, generator=torch.Generator().manual_seed(0)).mul(0.6).exp()
    drawn[0] = torch.inf  # one sentence has the batch's length

    def scaled(scale: float) -> Tensor:
        return (scale * drawn).clamp(1, seq).round().long()

    low, high = 0.0, float(seq / drawn.min())
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if scaled(middle).sum() < wanted else (low, middle)
    lengths = scaled(high)
    # The last step of the scale may have lengthened several sentences at once.
    while int(lengths.sum()) > wanted:
        lengths[1 + int(lengths[1:].argmax())] -= 1
    return tuple(lengths.tolist())


def batch_of(model: Model, lengths: tuple[int, ...], dtype: torch.dtype) -> Batch:
    """A batch for ``model``; one of an image encoder has pixels of ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    batch, seq, config = len(lengths), max(lengths), model.config
    if model.kind == "image encoder":
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        labels = torch.randint(config.num_labels, (batch,), generator=generator)
        return Batch(
            {"pixel_values": torch.randn(shape, generator=generator).to(dtype)}, labels, None
        )
    ids = torch.randint(1, config.vocab_size, (batch, seq), generator=generator)
    if model.kind == "decoder":
        return Batch({"input_ids": ids}, ids, None)
    tokens = torch.arange(seq) < torch.tensor(lengths)[:, None]
    ids.masked_fill_(~tokens, config.pad_token_id)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    return Batch({"input_ids": ids, "attention_mask": tokens.long()}, labels, tokens)


def image_tokens(model: Model) -> int:
    """Patches of an image, and the token of its class."""
    return (model.config.image_size // model.config.patch_size) ** 2 + 1
