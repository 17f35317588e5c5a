"""``torch.nn.functional.scaled_dot_product_attention`` on fastattn's kernels, for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

from fastattn.functional import drop_in

_lock = threading.Lock()
_depth = 0
_former: Callable[..., Tensor] = F.scaled_dot_product_attention  # what _sdpa stands in for


@contextmanager
def override_sdpa() -> Iterator[None]:
    """Within it, ``torch.nn.functional.scaled_dot_product_attention`` is fastattn's.

    It holds for every thread until the last one has left, and may be nested. Calls that fastattn
    has no kernel for (other devices and dtypes, nested tensors, tensor subclasses) and calls that
    it refuses go to torch's own, with torch's own errors.
    Code that took the function by ``from torch.nn.functional import scaled_dot_product_attention``
    before keeps what it took.
    """
    global _depth, _former
    with _lock:
        if _depth == 0:
            _former, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _sdpa
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                F.scaled_dot_product_attention = _former


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's signature and meaning."""
    return drop_in.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        otherwise=_former,
    )
