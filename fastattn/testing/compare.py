"""The error policy: a result is measured against the float64 oracle, and may be off by as much as
torch's own result in the same dtype, plus rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number of the dtype.

    Args:
        dtype: a floating-point dtype.

    >>> unit_roundoff(torch.float32) == 2.0**-24
    True
    """
    return torch.finfo(dtype).eps / 2


def _error(actual: Tensor, oracle: Tensor) -> Tensor:
    """|actual - oracle| in float64; 0 where both are the same infinity, infinite at any other
    infinity and at a NaN."""
    actual, oracle = actual.double(), oracle.double()
    return torch.where(actual == oracle, 0.0, (actual - oracle).abs().nan_to_num(math.inf))


def assert_close(name: str, actual: Tensor, oracle: Tensor, bound: Tensor | float) -> None:
    """|actual - oracle| <= bound everywhere. Infinities must stand at the same places, and a NaN
    fails on either side.

    Args:
        name: of the result, for the message.
        actual: the result, any dtype.
        oracle: the same result in float64, of actual's shape.
        bound: the largest absolute error, a number or a tensor that broadcasts to that shape.

    Raises:
        AssertionError: names the worst coordinate: its index, what was expected and got, the error
            and the bound.

    >>> assert_close("y", torch.ones(2), torch.tensor([1.0, 1.5]), 0.1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: y: 1 of 2 elements are off; worst at (1,): expected 1.5, got 1, error 0.5, ...
    """
    assert actual.shape == oracle.shape, (
        f"{name}: expected shape {tuple(oracle.shape)}, got {tuple(actual.shape)}"
    )
    if actual.numel() == 0:
        return
    error = _error(actual, oracle)
    bound = torch.as_tensor(bound, dtype=torch.float64, device=error.device).expand(error.shape)
    bad = ~(error <= bound) | (error == math.inf)
    if not bad.any():
        return
    excess = torch.where(bad, error - bound.nan_to_num(0.0), -math.inf).nan_to_num(math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), error.shape))
    raise AssertionError(
        f"{name}: {int(bad.sum())} of {bad.numel()} elements are off; worst at {worst}: "
        f"expected {oracle[worst].item():.9g}, got {actual[worst].item():.9g}, "
        f"error {error[worst].item():.3g}, allowed {bound[worst].item():.3g}"
    )


def assert_accurate(
    name: str, actual: Tensor, oracle: Tensor, peer: Tensor, *, factor: float = 2.0
) -> None:
    """The largest error is at most ``factor`` times the peer's, plus 2 ulp of the oracle's size.

    Args:
        name: of the result, for the message.
        actual: the kernel's result.
        oracle: the same result in float64.
        peer: torch's result in actual's dtype.
        factor: the hard limit of the policy is 2.

    Raises:
        AssertionError: names the worst coordinate.

    >>> x = torch.linspace(0, 1, 100)
    >>> assert_accurate("exp", x.exp(), x.double().exp(), torch.exp(x))
    """
    assert actual.dtype == peer.dtype, f"{name}: expected {peer.dtype}, got {actual.dtype}"
    finite = oracle.double().nan_to_num(0.0, 0.0, 0.0)
    size = float(finite.abs().max()) if finite.numel() else 0.0
    errors = _error(peer, oracle)
    peer_error = float(errors.max()) if errors.numel() else 0.0
    bound = factor * peer_error + 4 * unit_roundoff(actual.dtype) * size
    assert_close(name, actual, oracle, bound)
