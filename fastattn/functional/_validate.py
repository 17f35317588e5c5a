"""Is this input legal? The Python mirror of csrc/common/validate.h, run before any kernel.

ValueError for sizes, devices and numbers, TypeError for kinds of objects and dtypes; each names
the argument, what was expected and what was got.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor


def _bad(kind: type[Exception], argument: str, expected: str, got: object) -> NoReturn:
    raise kind(f"{argument}: expected {expected}, got {got}")


def tensor(argument: str, x: object) -> None:
    if not isinstance(x, Tensor):
        _bad(TypeError, argument, "a tensor", type(x).__name__)
    if not x.dtype.is_floating_point:
        _bad(TypeError, argument, "a floating-point tensor", x.dtype)


def like(argument: str, x: object, first_name: str, first: Tensor) -> None:
    """x is a tensor of first's dtype, on its device."""
    tensor(argument, x)
    if x.dtype != first.dtype:
        _bad(TypeError, argument, f"{first_name}'s dtype {first.dtype}", x.dtype)
    if x.device != first.device:
        _bad(ValueError, argument, f"{first_name}'s device {first.device}", x.device)


def number(argument: str, x: object) -> None:
    if isinstance(x, bool) or not isinstance(x, int | float | torch.SymFloat | torch.SymInt):
        _bad(TypeError, argument, "a number", type(x).__name__)
    if isinstance(x, float) and not -math.inf < x < math.inf:
        _bad(ValueError, argument, "a finite number", x)


def probability(argument: str, p: object) -> None:
    number(argument, p)
    if not 0.0 <= p < 1.0:
        _bad(ValueError, argument, "a probability in [0, 1)", p)


def attention(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    tensor("query", query)
    like("key", key, "query", query)
    like("value", value, "query", query)
    rank = query.dim()
    if not 2 <= rank <= 9:
        _bad(ValueError, "query", "2 to 9 dimensions [..., heads, seq, dim]", tuple(query.shape))
    for name, x in (("key", key), ("value", value)):
        if x.dim() != rank:
            _bad(ValueError, name, f"query's rank {rank}", tuple(x.shape))
    if key.shape[-1] != query.shape[-1]:
        _bad(ValueError, "key", f"query's head dim {query.shape[-1]}", tuple(key.shape))
    if value.shape[-2] != key.shape[-2]:
        _bad(ValueError, "value", f"key's sequence length {key.shape[-2]}", tuple(value.shape))
    if query.shape[-1] == 0:
        _bad(ValueError, "query", "a head dim of at least 1", tuple(query.shape))
    if rank == 2:
        return
    heads_q, heads_k, heads_v = query.shape[-3], key.shape[-3], value.shape[-3]
    if heads_k != heads_v:
        _bad(ValueError, "value", f"key's {heads_k} heads", f"{heads_v} heads")
    if heads_q != heads_k:
        if not enable_gqa:
            _bad(
                ValueError,
                "key",
                f"query's {heads_q} heads (or enable_gqa=True)",
                f"{heads_k} heads",
            )
        if heads_k == 0 or heads_q % heads_k != 0:
            _bad(ValueError, "key", f"a number of heads that divides query's {heads_q}", heads_k)


def attn_mask(mask: object, query: Tensor, scores_shape: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor):
        _bad(TypeError, "attn_mask", "a tensor or None", type(mask).__name__)
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


def extras(window_size: object, softcap: object, alibi_slopes: object, query: Tensor) -> None:
    if window_size is not None:
        pair = isinstance(window_size, tuple | list) and len(window_size) == 2
        if not pair or not all(isinstance(w, int) and w >= -1 for w in window_size):
            _bad(
                ValueError,
                "window_size",
                "(left, right), each >= 0 or -1 for unbounded",
                window_size,
            )
    number("softcap", softcap)
    if softcap < 0:
        _bad(ValueError, "softcap", "0 (off) or a positive number", softcap)
    if alibi_slopes is not None:
        tensor("alibi_slopes", alibi_slopes)
        heads = query.shape[-3] if query.dim() > 2 else 1
        shapes = [(heads,)] + ([(query.shape[0], heads)] if query.dim() > 3 else [])
        if tuple(alibi_slopes.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            _bad(ValueError, "alibi_slopes", f"shape {expected}", tuple(alibi_slopes.shape))


def sequence_starts(argument: str, starts: object, query: Tensor) -> None:
    if not isinstance(starts, Tensor) or starts.dtype not in (torch.int32, torch.int64):
        got = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
        _bad(TypeError, argument, "an int32 or int64 tensor", got)
    if starts.dim() != 1 or starts.numel() == 0:
        _bad(ValueError, argument, "shape [B + 1]", tuple(starts.shape))
    if starts.device != query.device:
        _bad(ValueError, argument, f"query's device {query.device}", starts.device)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, suffix: str = "") -> None:
    tensor("input", input)
    if input.dim() < 1:
        _bad(ValueError, "input", "at least 1 dimension [..., in_features]", tuple(input.shape))
    like(f"weight{suffix}", weight, "input", input)
    if weight.dim() != 2:
        expected = "2 dimensions [out_features, in_features]"
        _bad(ValueError, f"weight{suffix}", expected, tuple(weight.shape))
    if bias is not None:
        like(f"bias{suffix}", bias, "input", input)
        if tuple(bias.shape) != (weight.shape[0],):
            _bad(ValueError, f"bias{suffix}", f"shape ({weight.shape[0]},)", tuple(bias.shape))


def layers(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    """A stack of linear layers, each as wide as the one before; they are numbered if several."""
    width = None
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        suffix = f" {number}" if len(weights) > 1 else ""
        linear(input, weight, bias, suffix)
        width = input.shape[-1] if width is None else width
        if weight.shape[1] != width:
            _bad(ValueError, f"weight{suffix}", f"in_features {width}", tuple(weight.shape))
        width = weight.shape[0]
