"""fastattn in place of ``torch.nn.functional.scaled_dot_product_attention``, for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.functional import drop_in

_lock = threading.Lock()
_depth = 0
_torchs = F.scaled_dot_product_attention
_former: Callable[..., Tensor] = _torchs  # what _sdpa stands in for


@contextmanager
def override_sdpa() -> Iterator[None]:
    """A context in which ``torch.nn.functional.scaled_dot_product_attention`` is fastattn's.

    - The context holds for every thread until the last one has left it, and may be nested.
    - torch's own function serves the calls that fastattn has no kernel for (other devices and
      dtypes, nested tensors, tensor subclasses) and those that fastattn refuses, with torch's own
      errors.
    - TorchScript compiles torch's function, as outside of the context.
    - Code that ran ``from torch.nn.functional import scaled_dot_product_attention`` before keeps
      torch's function.

    >>> import torch, fastattn
    >>> query, key, value = torch.randn(3, 2, 8, 16, 64)
    >>> with fastattn.override_sdpa():
    ...     torch.nn.functional.scaled_dot_product_attention(query, key, value).shape
    torch.Size([2, 8, 16, 64])
    """
    global _depth, _former
    with _lock:
        if _depth == 0:
            _tell_torchscript()
            _former, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _sdpa  # type: ignore[assignment]
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                F.scaled_dot_product_attention = _former


def _tell_torchscript() -> None:
    """Makes torch.jit.script compile torch's operator for a call of _sdpa. It would read _sdpa's
    source otherwise, and could not compile torch's own modules within override_sdpa, or ever
    after."""
    try:
        table = torch.jit._builtins._get_builtin_table()
        table.setdefault(id(_sdpa), table[id(_torchs)])
    except (AttributeError, KeyError):  # not a public interface
        pass


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
