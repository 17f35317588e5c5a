"""The ops' floating-point operations for ``torch.utils.flop_counter.FlopCounterMode``. As torch
does for its own attention, a product counts whole, whatever mask hides of it; packed sequences
count their own lengths, where those can be read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastattn import _extension


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    of_scores: int,
    of_values: int,
) -> int:
    """``of_scores`` products over D and ``of_values`` over Dv."""
    pairs = query.shape[:-1].numel() * key.shape[-2]
    if starts_q is not None:
        # Fake, or on the meta device: at most every pair of tokens.
        with contextlib.suppress(RuntimeError):
            pairs = query.shape[-3] * int((starts_q.diff() * starts_k.diff()).sum())
    return 2 * pairs * (of_scores * query.shape[-1] + of_values * value.shape[-1])


def _starts(args: Sequence[object]) -> tuple[Tensor | None, Tensor | None]:
    """The packed sequences' starts: the last tensors of every attention op but the extras."""
    at = next(n for n, x in enumerate(args) if isinstance(x, bool | int | float))
    return args[at - 2], args[at - 1]


def _attention_forward(query, key, value, *rest, out_val=None, **_):
    return _attention(query, key, value, *_starts(rest), 1, 1)


def _attention_backward(grad_out, grad_lse, query, key, value, *rest, out_val=None, **_):
    # S, dQ, dK and dP, dV
    return _attention(query, key, value, *_starts(rest), 3, 2)


def _attention_jvp(query, key, value, *rest, out_val=None, **_):
    return _attention(query, key, value, *_starts(rest), *_tangent_products(rest))


def _attention_double_backward(grad_out, grad_lse, query, key, value, *rest, out_val=None, **_):
    """Those of E14, and with needs[0] the tangent's with V."""
    t_query, t_key, t_value, _mask = rest[2:6]
    in_tangent, needs = (t_query is not None) + (t_key is not None), rest[-1]
    of_scores = 1 + in_tangent
    of_scores += (1 + (t_key is not None)) * needs[1] + (1 + (t_query is not None)) * needs[2]
    of_values = 1 + (t_value is not None) + needs[3] + (1 + (t_value is not None)) * needs[0]
    return _attention(query, key, value, *_starts(rest), of_scores, of_values)


def _tangent_products(rest: Sequence[object]) -> tuple[int, int]:
    """S and A over D, with V and tV over Dv: E12."""
    t_query, t_key, t_value, t_mask = rest[2:6]
    in_scores = (t_query is not None) + (t_key is not None)
    return 1 + in_scores, (in_scores > 0 or t_mask is not None) + (t_value is not None)


def _product(input: Tensor, weight: Tensor) -> int:
    return 2 * input.shape[:-1].numel() * weight.numel()


def _linear_relu_forward(input, weight, *_, out_val=None, **__):
    return _product(input, weight)


def _linear_relu_backward(grad_out, input, weight, mask, needs, *_, out_val=None, **__):
    return _product(input, weight) * (needs[0] + needs[1])


def _linear_relu_jvp(input, weight, mask, t_input, t_weight, *_, out_val=None, **__):
    return _product(input, weight) * ((t_input is not None) + (t_weight is not None))


def _mlp_forward(input, weights, *_, out_val=None, **__):
    return sum(_product(input, weight) for weight in weights)


def _mlp_backward(grad_out, input, weights, hidden, needs, *_, out_val=None, **__):
    total, below = 0, needs[0]
    for layer, weight in enumerate(weights):
        total += _product(input, weight) * (needs[1 + layer] + below)
        below = below or needs[1 + layer] or needs[1 + len(weights) + layer]
    return total


_FORMULAS: dict[str, Callable[..., int]] = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "attention_jvp": _attention_jvp,
    "attention_double_backward": _attention_double_backward,
    "linear_relu_forward": _linear_relu_forward,
    "linear_relu_backward": _linear_relu_backward,
    "linear_relu_jvp": _linear_relu_jvp,
    "mlp_forward": _mlp_forward,
    "mlp_inference": _mlp_forward,
    "mlp_backward": _mlp_backward,
}

for _namespace in ["fastattn_triton", *(["fastattn"] if _extension.HAS_NATIVE else [])]:
    for _name, _formula in _FORMULAS.items():
        if hasattr(getattr(torch.ops, _namespace), _name):
            op = getattr(getattr(torch.ops, _namespace), _name)
            register_flop_formula(op, get_raw=True)(_formula)
