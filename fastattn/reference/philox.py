"""Dropout's keep-mask, by the random number generator Philox4x32-10."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words for each counter: Philox4x32-10 (Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3").

    Args:
        counter: four int64 tensors that hold 32-bit words and broadcast.
        key: two int64 tensors likewise, the low and the high word of the seed.

    Returns:
        Four int64 tensors that hold 32-bit words.

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [f"{int(word):08x}" for word in philox([zero] * 4, (zero, zero))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and low words of x * factor, by 16-bit halves as int64 is signed."""
    low = x * (factor & 0xFFFF)
    high = x * (factor >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_keep_mask(
    seed: Tensor,
    batch: int,
    heads: int,
    seq_q: int,
    seq_k: int,
    p: float,
    device: torch.device,
    first_row: int = 0,
    first_batch: int = 0,
) -> Tensor:
    """The dropout keep-mask, bool ``[batch, heads, seq_q, seq_k]``: an element is kept where its
    random word is at least ``floor(p · 2^32)``.

    Args:
        seed: int64 ``[n]``; each serves ``batch / n`` batch elements that follow each other.
        batch: batch elements.
        heads: query heads.
        seq_q: query rows.
        seq_k: keys.
        p: probability of dropping an element.
        device: of the mask.
        first_row: the number of the first row in the counter.
        first_batch: the number of each seed's first batch element in the counter.

    >>> seed, device = torch.tensor([1]), torch.device("cpu")
    >>> keep = philox_keep_mask(seed, 2, 4, 64, 64, 0.25, device)
    >>> round(keep.double().mean().item(), 2)
    0.75
    """

    def axis(n: int, dim: int, first: int = 0) -> Tensor:
        return torch.arange(first, first + n, device=device).view(
            [-1 if d == dim else 1 for d in range(4)]
        )

    columns, batches = axis(seq_k, 3), axis(batch, 0)
    each = max(1, batch // seed.numel())
    seed = seed.to(device).reshape(-1)[batches // each]
    rows, element = axis(seq_q, 2, first_row), first_batch + batches % each
    counter = (columns // 4, rows, axis(heads, 1), element)
    key = (seed & _WORD, (seed >> 32) & _WORD)
    words = torch.stack(torch.broadcast_tensors(*philox(counter, key)))
    word = words.gather(0, (columns % 4).expand(1, batch, heads, seq_q, seq_k))[0]
    return word >= math.floor(p * 2**32)
