"""``torch.nn.functional.scaled_dot_product_attention`` on fastattn's kernels, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastattn import backends, functional

_torch_sdpa = torch.nn.functional.scaled_dot_product_attention


def _serves(query: object, key: object, value: object, attn_mask: object) -> bool:
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in (query, key, value))
    if not plain or any(x.is_nested for x in (query, key, value)):
        return False
    if attn_mask is not None and (type(attn_mask) not in (Tensor, torch.nn.Parameter)):
        return False
    if not query.dtype == key.dtype == value.dtype or query.shape[-1] == 0:
        return False
    problem = backends.Problem("attention", query.device.type, query.dtype)
    return not backends.reasons(problem, "cpu")


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    served = _serves(query, key, value, attn_mask)
    implementation = functional.scaled_dot_product_attention if served else _torch_sdpa
    return implementation(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


@contextmanager
def override_sdpa() -> Iterator[None]:
    """Within it, ``torch.nn.functional.scaled_dot_product_attention`` is fastattn's, for every thread.

    Calls that fastattn has no kernel for (nested tensors, tensor subclasses, other devices) go to torch's own. Code
    that took the function by ``from torch.nn.functional import ...`` before keeps what it took.
    """
    before = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = _sdpa
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = before
