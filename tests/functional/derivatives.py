"""What the tests of derivatives share: float64, small inputs, attention by a backend, vmap by a
loop."""

from __future__ import annotations

import pytest
import torch

import fastattn

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def qkv() -> list[torch.Tensor]:
    """Query ``[2, 4, 3]``, key and value ``[2, 5, 3]``; the same at each call."""
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(2, s, 3, dtype=torch.float64, generator=draws) for s in (4, 5, 5)]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def attention(backend: str = "cpu", **options):
    return lambda q, k, v, *mask: fastattn.scaled_dot_product_attention(
        q, k, v, *mask, backend=backend, **options
    )


def looped(function, in_dims, *inputs):
    """vmap by a loop."""
    size = next(x.shape[d] for x, d in zip(inputs, in_dims, strict=True) if d is not None)
    results = [
        function(
            *(x if d is None else x.select(d, n) for x, d in zip(inputs, in_dims, strict=True))
        )
        for n in range(size)
    ]
    if isinstance(results[0], tuple):
        return tuple(map(torch.stack, zip(*results, strict=True)))
    return torch.stack(results)
