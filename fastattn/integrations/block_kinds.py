"""What the kernels compute of each kind of block (``blocks``), and where they may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn import _products, functional
from fastattn.functional import _served, inference
from fastattn.functional._served import (
    crosswise_product_wins,
    is_small_product,
    ordinary,
    serves_layers,
    serves_norm,
    serves_rms_norm,
    unobserved,
)
from fastattn.integrations import forwards
from fastattn.integrations.activations import activation_of
from fastattn.integrations.forwards import Match
from fastattn.nn._plain import (
    has_hooks,
    is_plain,
    no_global_hooks,
)
from fastattn.nn.dropout import fused_dropout, is_dropout, is_plain_dropout
from fastattn.nn.linear import Linear, is_plain_linear


class Kind(NamedTuple):
    """Both functions take the module and the match of its class's forward."""

    compute: Callable[..., Tensor | None]  # its arguments too; None where kernels may not stand in
    fits: Callable[[nn.Module, Match], bool]  # whether the children are such as can be fused
    small_below: Callable[[nn.Module, Match], int]  # elements of the last argument: torch's code
    reason: str


# --- linear layers and what follows them ----------------------------------------------------------


class _Layer(NamedTuple):
    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None


def _layer(module: Any, x: Any) -> _Layer | None:
    """The linear layer that calling ``module`` with ``x`` is, where kernels may compute it with
    what follows, and are faster."""
    if is_plain_linear(module):
        layer = _Layer(module.weight, module.bias)
    else:
        found = None if has_hooks(module) else _conv1d_layer(module, x)
        if found is None:
            return None
        layer = found
    if not ordinary(x) or not serves_layers(x, [layer.weight], [layer.bias]):
        return None
    return None if is_small_product(x, layer.weight.numel()) else layer


def _is_linear(module: object) -> bool:
    """Whether the module's class is torch's Linear, or the one that ``patch`` gives it."""
    return type(module) in (nn.Linear, Linear)


def _may_fuse(x: Any) -> bool:
    """Whether a block's children may be left uncalled."""
    return type(x) is Tensor and no_global_hooks() and unobserved()


def _chain(module: nn.Module, match: Match, x: Any) -> Tensor | None:
    if not _may_fuse(x) or (torch.compiler.is_compiling() and _calls_a_global(match)):
        return None
    parts = match.values(module, match.known.items)
    return None if parts is None else _run(module, parts, x)


def _calls_a_global(match: Match) -> bool:
    """Dynamo cannot look it up as we do."""
    return not all(item.islower() for item in match.known.items)


def _run(module: nn.Module, parts: Sequence[Any], x: Any) -> Tensor:
    """Calls the parts one after the other, a linear layer with the activation behind it, and with
    dropout behind that, as one."""
    i = 0
    while i < len(parts):
        name = activation_of(parts[i + 1]) if i + 1 < len(parts) else None
        layer = None if name is None else _layer(parts[i], x)
        p = fused_dropout(module, parts[i + 2]) if i + 2 < len(parts) else None
        if layer is None or not (p or _served.epilogue_wins(x, name)):
            x = parts[i](x)
            i += 1
            continue
        if not p and inference.applies(x):
            x = inference.linear_activation(x, layer.weight, layer.bias, name, 0.0)
        else:
            x = functional.linear(x, layer.weight, layer.bias, name, p or 0.0)
        i += 2 if p is None else 3
    return x


def _fits_chain(module: nn.Module, match: Match) -> bool:
    parts = [match.value(module, item) for item in match.known.items]
    return any(
        (_is_linear(a) or is_conv1d(type(a))) and activation_of(b) is not None
        for a, b in pairwise(parts)
    )


def _small_layers(module: nn.Module, match: Match) -> int:
    """The number of elements of an input below which the work of no layer repays a kernel call."""
    items = match.known.items or tuple("gu" if "u" in match.names else "g")
    weights = []
    for part in (match.value(module, item) for item in items):
        if isinstance(part, nn.Linear):
            weights.append(part.weight)
        elif (conv1d := _conv1d(type(part))) is not None:
            weights.append(conv1d.value(part, "w").t())
    largest = max(weight.numel() for weight in weights)
    return _served.least_work(weights[0].dtype) * weights[0].shape[1] // max(1, largest)


def _chain_to_dtype(module: nn.Module, match: Match, x: Any) -> Tensor | None:
    if not _may_fuse(x) or not _keeps_dtype(module, match, x):
        return None
    return _run(module, [match.value(module, item) for item in "gapo"], x)


def _fits_chain_to_dtype(module: nn.Module, match: Match) -> bool:
    linear, activation, out = (match.value(module, item) for item in "gao")
    return _is_linear(linear) and _is_linear(out) and activation_of(activation) is not None


def _keeps_dtype(module: nn.Module, match: Match, x: Tensor) -> bool:
    """Whether what lies between x and the last Linear has that layer's dtype: it is then not
    converted."""
    inner, dropout, out = (match.value(module, item) for item in "gpo")
    return (
        is_plain_linear(out)
        and is_plain_linear(inner)
        and is_plain_dropout(dropout)
        and activation_of(match.value(module, "a")) is not None
        and match.means_the_same()
        and not torch.is_autocast_enabled(x.device.type)
        and out.weight.dtype == inner.weight.dtype == x.dtype
    )


def _normed(module: nn.Module, match: Match, x: Any, residual: Any) -> Tensor | None:
    linear, dropout, norm = (match.value(module, item) for item in "lpn")
    if not getattr(dropout, "training", False):
        return None
    p = fused_dropout(module, dropout)
    if (
        not p  # without dropout torch's sum and norm are as fast
        or not is_plain(norm, nn.LayerNorm)
        or not no_global_hooks()
        or not unobserved()
        or x is None
        or residual is None
        or not ordinary(x, residual)
        or norm.normalized_shape != residual.shape[-1:]
        or not serves_norm(residual, norm.weight, norm.bias)
    ):
        return None
    out = linear(x)
    if out.shape != residual.shape:  # torch's sum broadcasts, or refuses
        return norm(dropout(out) + residual)
    return functional.dropout_add_norm(out, residual, norm.weight, norm.bias, p, norm.eps)


def _small_sum(module: nn.Module, match: Match) -> int:
    return _served.LEAST_NORM


def _fits_normed(module: nn.Module, match: Match) -> bool:
    linear, dropout, norm = (match.value(module, item) for item in "lpn")
    known = isinstance(linear, nn.Linear) or is_conv1d(type(linear))
    return known and is_dropout(dropout) and type(norm) is nn.LayerNorm


# --- Conv1D: a linear layer whose weight is [in_features, out_features] ---------------------------


def is_conv1d(kind: type) -> bool:
    """Whether a class is GPT-2's Conv1D, or the one that ``patch`` makes of it."""
    return _conv1d(kind) is not None


def _conv1d(kind: type) -> Match | None:
    stock: Any = vars(kind).get("_fastattn_stock", kind)
    found = forwards.match(getattr(stock, "forward", None))
    return found if found is not None and found.known.kind == "conv1d" else None


def _conv1d_layer(module: nn.Module, x: Any) -> _Layer | None:
    match = _conv1d(type(module))
    if match is None or not ordinary(x) or x is None or not x.is_contiguous():
        return None
    weight, bias = match.value(module, "w"), match.value(module, "b")
    if not ordinary(weight, bias) or weight is None or bias is None or weight.dim() != 2:
        return None
    n_in, n_out = weight.shape
    if match.value(module, "f") != n_out or x.dim() < 1 or x.shape[-1] != n_in:
        return None
    return _Layer(weight.t(), bias) if crosswise_product_wins(x, weight) else None


def _conv1d_forward(module: nn.Module, match: Match, x: Any) -> Tensor | None:
    if type(x) is not Tensor or torch.compiler.is_compiling() or not unobserved():
        return None
    layer = _conv1d_layer(module, x)
    if layer is None or not serves_layers(x, [layer.weight], [layer.bias]):
        return None
    return functional.mlp(x, [layer.weight], [layer.bias])


def _fits_conv1d(module: nn.Module, match: Match) -> bool:
    weight = match.value(module, "w")
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return False
    device = torch.device("cpu") if weight.is_meta else weight.device
    n_in, n_out = weight.shape
    return _products.why_swap(n_out, n_in, weight.dtype, device) is not None


def _small_conv1d(module: nn.Module, match: Match) -> int:
    return _served.LEAST_ROWS * match.value(module, "w").shape[0]


# --- gated ----------------------------------------------------------------------------------------


def _gated_product(name: str | None, gate: Any, up: Any, x: Any) -> Tensor | None:
    """activation(gate(x)) · up(x), or None."""
    if name is None or not _may_fuse(x):
        return None
    one, other = _layer(gate, x), _layer(up, x)
    if one is None or other is None or one.weight.shape != other.weight.shape:
        return None
    if not _served.epilogue_wins(x, name):
        return None
    weights = (one.weight, other.weight, None, one.bias, other.bias)
    return functional.gated_mlp(x, *weights, activation=name)


def _gated(module: nn.Module, match: Match, x: Any) -> Tensor | None:
    if torch.compiler.is_compiling() and "G" in match.names:
        return None
    parts = match.values(module, (_gate_activation(match), "g", "u", "o"))
    if parts is None:
        return None
    activation, gate, up, out = parts
    hidden = _gated_product(activation_of(activation), gate, up, x)
    return None if hidden is None else out(hidden)


def _gate_activation(match: Match) -> str:
    names = match.names
    return "a" if "a" in names else "G.H.I" if "I" in names else "G.H"


def _fits_gated(module: nn.Module, match: Match) -> bool:
    linears = all(_is_linear(match.value(module, item)) for item in "gu")
    known = activation_of(match.value(module, _gate_activation(match))) is not None
    return linears and known and isinstance(match.value(module, "o"), nn.Module)


def _gated_to_dtype(module: nn.Module, match: Match, x: Any) -> Tensor | None:
    if not _may_fuse(x) or not _keeps_dtype(module, match, x):
        return None
    gate, up, dropout, out = (match.value(module, item) for item in "gupo")
    hidden = _gated_product(activation_of(match.value(module, "a")), gate, up, x)
    return None if hidden is None else out(dropout(hidden))


# --- norms ----------------------------------------------------------------------------------------


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return functional.dropout_add_norm(x, None, weight, None, 0.0, eps, kind="rms")


def _small_norm(module: nn.Module, match: Match) -> int:
    return _served.LEAST_RMS_NORM


def _norm_parts(module: nn.Module, match: Match, x: Any) -> tuple[Tensor, float] | None:
    """The weight and epsilon of an RMSNorm that a kernel may compute."""
    if type(x) is not Tensor or not unobserved() or torch.compiler.is_compiling():
        return None
    weight, eps = match.value(module, "w"), match.value(module, "e")
    served = serves_rms_norm(x, weight, eps) and match.means_the_same()
    return (weight, eps) if served else None


def _multiplied(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The normalised row is rounded to its dtype before it is multiplied."""
    if x.dtype == weight.dtype == torch.float32:
        return _rms(x, weight, eps)
    return weight * _rms(x, None, eps)


def _rms_norm(module: nn.Module, match: Match, x: Any) -> Tensor | None:
    found = _norm_parts(module, match, x)
    return None if found is None else _multiplied(x, *found)


def _rms_norm_in_one_dtype(module: nn.Module, match: Match, x: Any) -> Tensor | None:
    """With another dtype of the weight the rows may not be rounded at all."""
    found = _norm_parts(module, match, x)
    return None if found is None or found[0].dtype != x.dtype else _multiplied(x, *found)


def _rms_norm_then_rounded(module: nn.Module, match: Match, x: Any) -> Tensor | None:
    """The product with the weight is rounded, once."""
    found = _norm_parts(module, match, x)
    if found is None or found[0].dtype not in (x.dtype, torch.float32):
        return None
    return _rms(x, *found)


def _method_parts(module: nn.Module, match: Match, x: Any) -> tuple[Tensor, float] | None:
    """``_norm_parts`` of a norm whose method n normalises."""
    normalised = _normalised(type(module), match)
    if type(x) is not Tensor or not unobserved() or torch.compiler.is_compiling():
        return None
    if normalised is None or match.names["n"] in vars(module):
        return None
    weight, eps = match.value(module, "w"), normalised.value(module, "e")
    return (weight, eps) if serves_rms_norm(x, weight, eps) else None


def _rms_norm_by_a_method(module: nn.Module, match: Match, x: Any) -> Tensor | None:
    found = _method_parts(module, match, x)
    return None if found is None else _multiplied(x, *found)


def _rms_norm_plus_one(module: nn.Module, match: Match, x: Any) -> Tensor | None:
    """The weight is what is added to one; the product with it is rounded, once."""
    found = _method_parts(module, match, x)
    if found is None or found[0].dtype == torch.float64:
        return None
    weight, eps = found
    return _rms(x, 1.0 + weight.float(), eps)


def _normalised(kind: type[nn.Module], match: Match) -> Match | None:
    """The match of the method that normalises, or None."""
    found = forwards.match(getattr(kind, match.names["n"], None))
    return found if found is not None and found.known.kind == "normalised" else None


def _fits_rms_norm(module: nn.Module, match: Match) -> bool:
    weight = match.value(module, "w")
    return isinstance(weight, nn.Parameter) and isinstance(match.value(module, "e"), float)


def _fits_method_norm(module: nn.Module, match: Match) -> bool:
    normalised = _normalised(type(module), match)
    if normalised is None or not isinstance(match.value(module, "w"), nn.Parameter):
        return False
    return isinstance(normalised.value(module, "e"), float)


_LAYER = "a Linear and its activation as one kernel call"
_GATED = "both products of a gated MLP as one kernel call"
_NORMED = "dropout, residual sum and norm as one kernel call in training"
_CONV1D = "the product as one kernel call where that is faster"
_RMS = "the norm as one kernel call"
KINDS: dict[str, Kind] = {
    "chain": Kind(_chain, _fits_chain, _small_layers, _LAYER),
    "chain to dtype": Kind(_chain_to_dtype, _fits_chain_to_dtype, _small_layers, _LAYER),
    "normed": Kind(_normed, _fits_normed, _small_sum, _NORMED),
    "gated": Kind(_gated, _fits_gated, _small_layers, _GATED),
    "gated to dtype": Kind(_gated_to_dtype, _fits_gated, _small_layers, _GATED),
    "conv1d": Kind(_conv1d_forward, _fits_conv1d, _small_conv1d, _CONV1D),
    "rms norm": Kind(_rms_norm, _fits_rms_norm, _small_norm, _RMS),
    "rms norm, then rounded": Kind(_rms_norm_then_rounded, _fits_rms_norm, _small_norm, _RMS),
    "rms norm in one dtype": Kind(_rms_norm_in_one_dtype, _fits_rms_norm, _small_norm, _RMS),
    "rms norm plus one": Kind(_rms_norm_plus_one, _fits_method_norm, _small_norm, _RMS),
    "rms norm by a method": Kind(_rms_norm_by_a_method, _fits_method_norm, _small_norm, _RMS),
}
