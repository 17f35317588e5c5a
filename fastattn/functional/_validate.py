"""Is this input legal? The Python mirror of csrc/common/validate_*.h, run before any kernel.

Sizes, devices and numbers raise ValueError, kinds of objects and dtypes TypeError. Each error names
the argument, what was expected and what was got.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastattn import ops


def _bad(kind: type[Exception], argument: str, expected: str, got: object) -> NoReturn:
    raise kind(f"{argument}: expected {expected}, got {got}")


def tensor(argument: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        _bad(TypeError, argument, "a tensor", type(x).__name__)
    if not x.dtype.is_floating_point:
        _bad(TypeError, argument, "a floating-point tensor", x.dtype)
    strided(argument, x)


def strided(argument: str, x: Tensor) -> None:
    if x.layout is not torch.strided:
        _bad(TypeError, argument, "a strided tensor", x.layout)
    if x.is_nested:
        _bad(TypeError, argument, "a strided tensor", "a nested one")


def like(argument: str, x: Any, first_name: str, first: Tensor) -> None:
    """x is a tensor of first's dtype, on its device."""
    tensor(argument, x)
    if x.dtype != first.dtype:
        _bad(TypeError, argument, f"{first_name}'s dtype {first.dtype}", x.dtype)
    if x.device != first.device:
        _bad(ValueError, argument, f"{first_name}'s device {first.device}", x.device)


def number(argument: str, x: Any) -> float:
    """x as Python's float. Torch's functions take what this takes: NumPy's scalars and tensors
    without dimensions too."""
    if isinstance(x, torch.SymFloat | torch.SymInt):
        return float(x)
    single = isinstance(x, Tensor) and x.dim() == 0 and not (x.is_complex() or x.requires_grad)
    if not single and not isinstance(x, int | float) and not isinstance(x, numbers.Real):
        _bad(TypeError, argument, "a number", type(x).__name__)
    try:
        as_float = float(x)
    except OverflowError:
        as_float = math.inf
    if not -math.inf < as_float < math.inf:
        _bad(ValueError, argument, "a finite number", x)
    return as_float


def probability(argument: str, p: Any) -> float:
    p = number(argument, p)
    if not 0.0 <= p <= 1.0:
        _bad(ValueError, argument, "a probability in [0, 1]", p)
    return p


def softcap(c: Any) -> float:
    """The softcap as a number, 0 where there is none."""
    c = 0.0 if c is None else number("softcap", c)
    if c < 0.0:
        _bad(ValueError, "softcap", "None, 0 (off) or a positive number", c)
    return c


_UNBOUNDED = 1 << 60  # the kernels' kUnbounded


def window(window_size: Any) -> tuple[int, int]:
    """The window as (left, right), -1 where a side is unbounded, as it is without a window."""
    if window_size is None:
        return -1, -1
    pair = isinstance(window_size, tuple | list) and len(window_size) == 2
    if not pair or not all(is_integer(w) and w >= -1 for w in window_size):
        expected = "(left, right), integers >= 0 or -1 for unbounded"
        _bad(ValueError, "window_size", expected, window_size)
    left, right = (-1 if w >= _UNBOUNDED else int(w) for w in window_size)
    return left, right


def is_integer(x: Any) -> bool:
    return isinstance(x, int | torch.SymInt | numbers.Integral)


def attention(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    tensor("query", query)
    like("key", key, "query", query)
    like("value", value, "query", query)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not 2 <= x.dim() <= 9:
            _bad(ValueError, name, "2 to 9 dimensions [..., heads, seq, dim]", tuple(x.shape))
    if key.shape[-1] != query.shape[-1]:
        _bad(ValueError, "key", f"query's head dim {query.shape[-1]}", tuple(key.shape))
    if value.shape[-2] != key.shape[-2]:
        _bad(ValueError, "value", f"key's sequence length {key.shape[-2]}", tuple(value.shape))
    if query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return
    heads_q, heads_k, heads_v = map(heads, (query, key, value))
    if enable_gqa and not heads_q == heads_k == heads_v:
        for name, n in (("key", heads_k), ("value", heads_v)):
            if n == 0 or heads_q % n != 0:
                _bad(ValueError, name, f"a number of heads that divides query's {heads_q}", n)
    else:
        allowed = " (or a divisor of query's, with enable_gqa=True)"
        if heads_k != heads_q and 1 not in (heads_k, heads_q):
            _bad(ValueError, "key", f"query's {heads_q} heads or 1{allowed}", f"{heads_k} heads")
        both = heads_k if heads_q == 1 else heads_q
        if heads_v != both and 1 not in (heads_v, both):
            _bad(ValueError, "value", f"{both} heads or 1{allowed}", f"{heads_v} heads")
    batch = query.shape[:-3]
    for name, x, others in (("key", key, "query's"), ("value", value, "query's and key's")):
        try:
            batch = torch.broadcast_shapes(batch, x.shape[:-3])
        except RuntimeError:
            expected = f"batch dimensions that broadcast with {others} {tuple(batch)}"
            _bad(ValueError, name, expected, tuple(x.shape[:-3]))


def heads(x: Tensor) -> int:
    """Of ``[..., heads, seq, dim]``; 1 without that dimension."""
    return x.shape[-3] if x.dim() > 2 else 1


def attn_mask(mask: Any, query: Tensor, scores_shape: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor):
        _bad(TypeError, "attn_mask", "a tensor or None", type(mask).__name__)
    strided("attn_mask", mask)
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        _bad(TypeError, "attn_mask", "a bool (True = attend) or floating-point tensor", mask.dtype)
    if mask.device != query.device:
        _bad(ValueError, "attn_mask", f"query's device {query.device}", mask.device)
    fits = mask.dim() <= len(scores_shape) and all(
        m == 1 or m == s for m, s in zip(mask.shape[::-1], scores_shape[::-1], strict=False)
    )
    if not fits:
        expected = f"a shape that broadcasts to {tuple(scores_shape)}"
        _bad(ValueError, "attn_mask", expected, tuple(mask.shape))


def slopes(alibi_slopes: Any, query: Tensor, batch: int | None) -> None:
    """batch: that of slopes ``[batch, Hq]``; None where slopes can only be ``[Hq]``."""
    tensor("alibi_slopes", alibi_slopes)
    if alibi_slopes.device != query.device:
        _bad(ValueError, "alibi_slopes", f"query's device {query.device}", alibi_slopes.device)
    shapes = [(heads(query),)] + ([] if batch is None else [(batch, heads(query))])
    if tuple(alibi_slopes.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        _bad(ValueError, "alibi_slopes", f"shape {expected}", tuple(alibi_slopes.shape))


def longest(argument: str, n: Any) -> Any:  # int | torch.SymInt
    """An upper bound of lengths, as the kernels take it."""
    if isinstance(n, bool) or not is_integer(n):
        got = n if isinstance(n, float) else type(n).__name__
        _bad(TypeError, argument, "an integer", got)
    if n < 0:
        _bad(ValueError, argument, "an integer of at least 0", n)
    return n if isinstance(n, torch.SymInt) else min(int(n), _LONGEST)


_LONGEST = 2**31 - 1  # a larger bound means no bound


def sequence_starts(argument: str, starts: object, query: Tensor) -> None:
    if not isinstance(starts, Tensor) or starts.dtype not in (torch.int32, torch.int64):
        got = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
        _bad(TypeError, argument, "an int32 or int64 tensor", got)
    strided(argument, starts)
    if starts.dim() != 1 or starts.numel() == 0:
        _bad(ValueError, argument, "shape [B + 1]", tuple(starts.shape))
    if starts.device != query.device:
        _bad(ValueError, argument, f"query's device {query.device}", starts.device)


def activation(name: str | None, optional: bool = True) -> None:
    if name not in ops.ACTIVATIONS or (name is None and not optional):
        known = ", ".join(repr(a) for a in ops.ACTIVATIONS if optional or a is not None)
        raise ValueError(f"activation: expected one of {known}, got {name!r}")


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, suffix: str = "", prefix: str = ""
) -> None:
    """A linear layer but for the width of its input; its weight is called prefix + weight + suffix
    in messages."""
    tensor("input", input)
    if input.dim() < 1:
        _bad(ValueError, "input", "at least 1 dimension [..., in_features]", tuple(input.shape))
    of_weight, of_bias = f"{prefix}weight{suffix}", f"{prefix}bias{suffix}"
    like(of_weight, weight, "input", input)
    if weight.dim() != 2:
        expected = "2 dimensions [out_features, in_features]"
        _bad(ValueError, of_weight, expected, tuple(weight.shape))
    if bias is not None:
        like(of_bias, bias, "input", input)
        if tuple(bias.shape) != (weight.shape[0],):
            _bad(ValueError, of_bias, f"shape ({weight.shape[0]},)", tuple(bias.shape))


def usual_layers(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether layers on one input pass all checks, asked in little time; where it says no, the
    checks themselves say why."""
    if not input.dim() or input.layout is not torch.strided:
        return False
    wide, dtype, device = input.shape[-1], input.dtype, input.device
    for w, b in zip(weights, biases, strict=True):
        if not isinstance(w, Tensor) or w.dtype != dtype or w.device != device:
            return False
        if w.dim() != 2 or w.shape[1] != wide or w.layout is not torch.strided:
            return False
        if b is None:
            continue
        if not isinstance(b, Tensor) or b.dtype != dtype or b.device != device:
            return False
        if b.shape != w.shape[:1] or b.layout is not torch.strided:
            return False
    return True


def width(input: Tensor, weight: Tensor, suffix: str = "", prefix: str = "") -> None:
    """Whether a weight has as many columns as input."""
    if weight.shape[1] != input.shape[-1]:
        expected = f"in_features {input.shape[-1]}"
        _bad(ValueError, f"{prefix}weight{suffix}", expected, tuple(weight.shape))


def numbered(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The weights and biases of several layers as lists of one length; no bias at all is None."""
    weights = list(weights)
    biases = [None] * len(weights) if biases is None else list(biases)
    if not weights:
        raise ValueError("weights: expected at least 1 layer, got none")
    if len(biases) != len(weights):
        raise ValueError(f"biases: expected {len(weights)} entries as weights, got {len(biases)}")
    return weights, biases


def layers(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    """A stack of linear layers, each as wide as the one before; they are numbered if several."""
    wide = None
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        suffix = f" {number}" if len(weights) > 1 else ""
        linear(input, weight, bias, suffix)
        wide = input.shape[-1] if wide is None else wide
        if weight.shape[1] != wide:
            _bad(ValueError, f"weight{suffix}", f"in_features {wide}", tuple(weight.shape))
        wide = weight.shape[0]


def norm(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> None:
    if input.dim() < 1:
        _bad(ValueError, "input", "at least 1 dimension [..., N]", tuple(input.shape))
    if residual is not None:
        like("residual", residual, "input", input)
        if residual.shape != input.shape:
            expected = f"input's shape {tuple(input.shape)}"
            _bad(ValueError, "residual", expected, tuple(residual.shape))
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    for name, x in (("weight", weight), ("bias", bias)):
        if x is None:
            continue
        tensor(name, x)
        if x.dtype not in (input.dtype, wide):
            _bad(TypeError, name, " or ".join(map(str, {input.dtype: 0, wide: 0})), x.dtype)
        if x.device != input.device:
            _bad(ValueError, name, f"input's device {input.device}", x.device)
        if tuple(x.shape) != (input.shape[-1],):
            _bad(ValueError, name, f"shape ({input.shape[-1]},)", tuple(x.shape))
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        _bad(TypeError, "bias", f"weight's dtype {weight.dtype}", bias.dtype)
