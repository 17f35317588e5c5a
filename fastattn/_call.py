"""One attention call, in one order:

    cotangents, inputs, extras, tangents, results, options, needs

each where a call has it. The ops' schemas, their kernels' arguments and the autograd Functions have
this order, and the reference takes the same groups. A new option is a field here and a word in
``ops/schemas.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

NATIVE = "native"  # the C++ kernels of the tensors' device; the other backend is "triton"


class Inputs(NamedTuple):
    """What attention is differentiated by."""

    query: Tensor  # [*, Hq, Sq, D]
    key: Tensor  # [*, Hk, Sk, D]
    value: Tensor  # [*, Hk, Sk, Dv]
    attn_mask: Tensor | None = None  # [*, Hq, Sq, Sk], each extent possibly 1


class Extras(NamedTuple):
    """The tensors of a call that have no derivative."""

    slopes: Tensor | None = None  # ALiBi's, [Hq] or [n, Hq]
    seed: Tensor | None = None  # int64 [n], n a divisor of the batch
    starts_q: Tensor | None = None  # [B + 1]: query is [1, Hq, tokens, D]
    starts_k: Tensor | None = None


class Options(NamedTuple):
    """The numbers of a call; the defaults change nothing."""

    is_causal: bool = False
    scale: float = 1.0
    dropout_p: float = 0.0
    left: int = -1  # the window's extents, -1 without a bound
    right: int = -1
    softcap: float = 0.0
    max_q: int = 0  # the longest of the packed sequences
    max_k: int = 0


class Results(NamedTuple):
    """What the forward pass leaves for the derivatives: the output and the LSE's parts, in the
    kernels' own unit of scores, so that rows of P sum to 1 however large the scores."""

    out: Tensor  # [*, Hq, Sq, Dv]
    row_max: Tensor  # [*, Hq, Sq]
    log_sum: Tensor


class Tangents(NamedTuple):
    """A direction of the inputs in their shapes; None for 0."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    attn_mask: Tensor | None = None


class Cotangents(NamedTuple):
    """Of the output and of the LSE; None for 0."""

    out: Tensor | None = None
    lse: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What of a call is not a tensor: to torch.func one argument, no tree."""

    options: Options
    backend: str = NATIVE


def split(args: Sequence[Any], *groups: Any) -> list[Any]:
    """The flat arguments of an op as these groups, classes of this module, and the arguments that
    follow them.

    >>> split((1, 2, 3, 4, "more"), Results)
    [Results(out=1, row_max=2, log_sum=3), 4, 'more']
    """
    found, rest = [], list(args)
    for group in groups:
        size = len(group._fields)
        found.append(group(*rest[:size]))
        rest = rest[size:]
    return found + rest
