"""The ops' floating-point operations for ``torch.utils.flop_counter.FlopCounterMode``. As torch
does for its own attention, a product counts whole, whatever mask hides of it; packed sequences
count their own lengths, where those can be read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastattn._call import Extras, Inputs, Tangents, split
from fastattn.ops import schemas


def _attention(inputs: Inputs, extras: Extras, of_scores: int, of_values: int) -> int:
    """``of_scores`` products over D and ``of_values`` over Dv."""
    query, key, value, _ = inputs
    pairs = query.shape[:-1].numel() * key.shape[-2]
    if extras.starts_q is not None and extras.starts_k is not None:
        # Fake, or on the meta device: at most every pair of tokens.
        with contextlib.suppress(RuntimeError):
            lengths = extras.starts_q.diff() * extras.starts_k.diff()
            pairs = query.shape[-3] * int(lengths.sum())
    return 2 * pairs * (of_scores * query.shape[-1] + of_values * value.shape[-1])


def _attention_forward(*args, out_val=None, **_):
    inputs, extras, *_rest = split(args, Inputs, Extras)
    return _attention(inputs, extras, 1, 1)


def _attention_backward(_grad_out, _grad_lse, *args, out_val=None, **_):
    inputs, extras, *_rest = split(args, Inputs, Extras)
    return _attention(inputs, extras, 3, 2)  # S, dQ, dK and dP, dV


def _attention_jvp(*args, out_val=None, **_):
    """S and A over D, with V and tV over Dv: E12."""
    inputs, extras, t, *_rest = split(args, Inputs, Extras, Tangents)
    in_scores = (t.query is not None) + (t.key is not None)
    of_values = (in_scores > 0 or t.attn_mask is not None) + (t.value is not None)
    return _attention(inputs, extras, 1 + in_scores, of_values)


def _attention_double_backward(_grad_out, _grad_lse, *args, out_val=None, **_):
    """Those of E14, and with needs[0] the tangent's with V."""
    inputs, extras, t, *_rest, needs = split(args, Inputs, Extras, Tangents)
    t_query, t_key, t_value = (x is not None for x in t[:3])
    of_scores = 1 + t_query + t_key + (1 + t_key) * needs[1] + (1 + t_query) * needs[2]
    of_values = 1 + t_value + needs[3] + (1 + t_value) * needs[0]
    return _attention(inputs, extras, of_scores, of_values)


def _product(input: Tensor, weight: Tensor) -> int:
    return 2 * input.shape[:-1].numel() * weight.numel()


def _linear_relu_forward(input, weight, *_, out_val=None, **__):
    return _product(input, weight)


def _linear_relu_backward(grad_out, input, weight, mask, needs, *_, out_val=None, **__):
    return _product(input, weight) * (needs[0] + needs[1])


def _linear_relu_jvp(input, weight, mask, t_input, t_weight, *_, out_val=None, **__):
    return _product(input, weight) * ((t_input is not None) + (t_weight is not None))


def _gated_linear_forward(input, gate_weight, weight, *_, out_val=None, **__):
    return _product(input, gate_weight) + _product(input, weight)


def _linear_backward(grads, input, weights, saved, dropout_p, needs, *_, out_val=None, **__):
    of_weights = needs[1 : 1 + len(weights)]
    return sum(
        _product(input, w) * (needs[0] + n) for w, n in zip(weights, of_weights, strict=True)
    )


def _mlp_forward(input, weights, *_, out_val=None, **__):
    return sum(_product(input, weight) for weight in weights)


def _mlp_backward(grad_out, input, weights, hidden, needs, *_, out_val=None, **__):
    total, below = 0, needs[0]
    for layer, weight in enumerate(weights):
        total += _product(input, weight) * (needs[1 + layer] + below)
        below = below or needs[1 + layer] or needs[1 + len(weights) + layer]
    return total


def _training_step(input, targets, parameters, *_, out_val=None, **__):
    """Three products a layer, but for the first one's gradient of the input."""
    weights = parameters[::2]
    return sum(_product(input, w) * (2 if i == 0 else 3) for i, w in enumerate(weights))


_FORMULAS: dict[str, Callable[..., int]] = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "attention_jvp": _attention_jvp,
    "attention_double_backward": _attention_double_backward,
    "linear_forward": _mlp_forward,
    "gated_linear_forward": _gated_linear_forward,
    "linear_backward": _linear_backward,
    "linear_relu_forward": _linear_relu_forward,
    "linear_relu_backward": _linear_relu_backward,
    "linear_relu_jvp": _linear_relu_jvp,
    "mlp_forward": _mlp_forward,
    "mlp_inference": _mlp_forward,
    "mlp_backward": _mlp_backward,
    "training_step": _training_step,
}


def register() -> None:
    for namespace, names in schemas.NAMESPACES.items():
        for name in _FORMULAS.keys() & names.keys():
            op = getattr(getattr(torch.ops, namespace), name)
            register_flop_formula(op, get_raw=True)(_FORMULAS[name])
