"""Linear layers with an activation and dropout, alone, several on one input, stacked and gated: the
user's functions."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn import _products, backends, reference
from fastattn.functional import _validate
from fastattn.functional._autograd import apply, autocast, transforming
from fastattn.functional.layer_functions import (
    ActivationFunction,
    GatedLinearFunction,
    LinearFunction,
)
from fastattn.functional.relu_layers import MLPFunction, layer_by_layer, linear_relu, op_validates


class _By(enum.Enum):
    """Who computes a call."""

    KERNELS = enum.auto()
    PRODUCT = enum.auto()  # torch, but for what follows the product
    TORCH = enum.auto()


def _chosen(
    input: Tensor,
    weights: Sequence[Tensor],
    backend: str | None,
    plain: bool = False,
    op: str = "activation_dropout",
) -> _By:
    """Torch, where the caller names the reference, under forward mode and torch.func, and on
    devices without kernels; torch's product on a GPU, and where the caller names nothing and it is
    faster: for ``plain`` products than the kernels', else than theirs with what follows."""
    kernels = backends.select_activation(input, backend, op)
    if kernels == "reference" or transforming():
        return _By.TORCH
    if kernels == "triton":
        return _By.PRODUCT
    if not plain or backends.named(backend):
        return _By.PRODUCT if backends.torch_multiplies(input, backend) else _By.KERNELS
    rows, n_in = input.numel() // max(1, input.shape[-1]), input.shape[-1]
    n_out = sum(w.shape[0] for w in weights)
    slower = _products.why_torchs(rows, n_out, n_in, input.dtype, input.device)
    return _By.KERNELS if slower is None else _By.PRODUCT


def _save(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of the tensors will be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    dropout_p: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """dropout(activation(input weightᵀ + bias)), ``[..., out_features]``, as one kernel.

    The product's epilogue adds the bias, applies the activation and drops elements; the backward
    multiplies by the activation's slope while it loads the gradient. No dropout mask is stored.

    Args:
        input: ``[..., in_features]``, floating point.
        weight: ``[out_features, in_features]``, of input's dtype and device; under autocast the
            dtypes may differ, and all are cast.
        bias: ``[out_features]`` or None.
        activation: None, ``"relu"``, ``"gelu"`` (by the normal distribution; Hendrycks and Gimpel
            2016, arXiv 1606.08415), ``"gelu_tanh"`` (their approximation), ``"silu"``, ``"relu2"``
            (the ReLU's square) or ``"quick_gelu"`` (z / (1 + e^(-1.702 z))).
        dropout_p: probability in [0, 1] of dropping an element; applied whenever it is above 0,
            training or not.
        backend: ``cpu``, ``triton`` (behind torch's product), ``reference``, or None for the
            kernels, or for torch's own product where that is faster.

    Returns:
        ``[..., out_features]`` in input's dtype. A NaN stays a NaN.

    Raises:
        ValueError: a shape, device, probability or activation that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: ``backend`` names one that cannot serve the call.

    >>> import torch, fastattn
    >>> input, weight, bias = torch.randn(4, 8), torch.randn(3, 8), torch.randn(3)
    >>> out = fastattn.linear(input, weight, bias, "gelu")
    >>> expected = torch.nn.functional.gelu(input @ weight.T + bias)
    >>> torch.allclose(out, expected, atol=1e-5)
    True
    """
    _validate.tensor("input", input)
    _validate.activation(activation)
    dropout_p = _validate.probability("dropout_p", dropout_p)
    if activation == "relu" and dropout_p == 0.0:
        return linear_relu(input, weight, bias, backend=backend)
    input, weight, bias = autocast(input, weight, bias)
    if not _validate.usual_layers(input, [weight], [bias]):
        _validate.layers(input, [weight], [bias])
    if dropout_p == 1.0:
        return linear(input, weight, bias, activation, backend=backend) * 0.0  # NaN stays
    plain = activation is None and dropout_p == 0.0
    by = _chosen(input, [weight], backend, plain)
    seed = _seed(dropout_p, input)
    if by is _By.TORCH or (by is _By.PRODUCT and not _pass_pays(activation, dropout_p, backend)):
        return reference.linear(
            input, weight, bias, activation=activation, dropout_p=dropout_p, seed=seed
        )
    if by is _By.PRODUCT:
        out = torch.nn.functional.linear(input, weight, bias)
        return _activated(out, activation, dropout_p, seed, backend)
    options = (activation, dropout_p, seed, _save(input, weight, bias))
    return apply(LinearFunction, input, *options, 1, weight, bias)[0]


def activation_dropout(
    input: Tensor,
    activation: str | None = None,
    dropout_p: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """dropout(activation(input)), in one pass forward and one pass backward.

    No dropout mask is stored.

    Args:
        input: ``[..., N]``, floating point.
        activation: as in ``fastattn.linear``.
        dropout_p: probability in [0, 1] of dropping an element; applied whenever it is above 0,
            training or not.
        backend: ``cpu``, ``triton``, ``reference``, or None for the first that serves the call.

    Returns:
        A tensor of input's shape and dtype. A NaN stays a NaN.

    Raises:
        ValueError: a shape, probability or activation that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: ``backend`` names one that cannot serve the call.

    >>> import torch, fastattn
    >>> fastattn.activation_dropout(torch.tensor([-1.0, 3.0]), "relu2")
    tensor([0., 9.])
    """
    _validate.tensor("input", input)
    _validate.activation(activation)
    dropout_p = _validate.probability("dropout_p", dropout_p)
    if input.dim() < 1:
        raise ValueError(f"input: expected at least 1 dimension, got {tuple(input.shape)}")
    if dropout_p == 1.0:
        return activation_dropout(input, activation, backend=backend) * 0.0  # NaN stays
    by, seed = _chosen(input, [], backend), _seed(dropout_p, input)
    if by is _By.TORCH or not _pass_pays(activation, dropout_p, backend):
        return reference.activation_dropout(
            input, activation=activation, dropout_p=dropout_p, seed=seed
        )
    return _activated(input, activation, dropout_p, seed, backend)


def _pass_pays(activation: str | None, dropout_p: float, backend: str | None) -> bool:
    """Whether one pass of the kernels is faster than torch's operations. Torch's time over ours for
    1024 x 768 and more, 2 threads of a Xeon with AVX-512, forward and backward: dropout 11 to 17
    and 0.7 (about 5 together), ``gelu_tanh`` 2.4 to 3.6 and 2.0 to 3.4, ``silu`` 1.0 to 1.1 and
    1.0 to 1.2, ``gelu`` 0.6 and 1.2."""
    if backends.named(backend):
        return activation is not None or dropout_p > 0.0
    return dropout_p > 0.0 or activation in ("gelu_tanh", "relu2", "quick_gelu")


def _activated(
    input: Tensor,
    activation: str | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> Tensor:
    kernels = backends.kernels_of(backends.select_activation(input, backend))
    return apply(ActivationFunction, input, activation, dropout_p, seed, kernels)


def _seed(dropout_p: float, like: Tensor) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=like.device)


def multi_linear(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """input weightᵀ + bias for several weights on one input, as one autograd node.

    Query, key and value of attention are such a call. The gradient of input is one product for all
    weights, and no sum of several.

    Args:
        input: ``[..., in_features]``, floating point.
        weights: L >= 1 tensors ``[out_features_l, in_features]``, of input's dtype and device;
            under autocast the dtypes may differ, and all are cast.
        biases: L tensors ``[out_features_l]`` or Nones, or None for no bias at all.
        backend: ``cpu``, ``reference``, or None for the kernels, or for torch's own product where
            that is faster.

    Returns:
        L tensors ``[..., out_features_l]`` in input's dtype.

    Raises:
        ValueError: a shape, device or number of layers that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: ``backend`` names one that cannot serve the call.

    >>> import torch, fastattn
    >>> query, key, value = fastattn.multi_linear(torch.randn(4, 8), list(torch.randn(3, 8, 8)))
    >>> value.shape
    torch.Size([4, 8])
    """
    _validate.tensor("input", input)
    weights, biases = _validate.numbered(weights, biases)
    count = len(weights)
    input, *parameters = autocast(input, *weights, *biases)
    weights, biases = parameters[:count], parameters[count:]
    if not _validate.usual_layers(input, weights, biases):
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            _validate.linear(input, weight, bias, f" {number}")
            _validate.width(input, weight, f" {number}")
    if _chosen(input, weights, backend, True, "multi_linear") is not _By.KERNELS:
        pairs = zip(weights, biases, strict=True)
        return tuple(reference.linear(input, weight, bias) for weight, bias in pairs)
    save = _save(input, *parameters)
    return apply(LinearFunction, input, None, 0.0, None, save, count, *parameters)[:count]


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    activation: str | None = "relu",
    dropout_p: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Linear-activation-dropout-...-Linear, nothing after the last.

    With a ReLU and no dropout it is one autograd node; else each layer is one, see
    ``fastattn.linear``.

    Args:
        input: ``[..., N_0]``, floating point.
        weights: L >= 1 tensors ``[N_l, N_{l-1}]``, of input's dtype and device; under autocast the
            dtypes may differ, and all are cast.
        biases: L tensors ``[N_l]`` or Nones, or None for no bias at all.
        activation: as in ``fastattn.linear``.
        dropout_p: probability in [0, 1] of dropping an element of what lies between the layers.
        backend: ``cpu``, ``cuda``, ``triton``, ``reference``, or None for the first that serves the
            call.

    Returns:
        ``[..., N_L]`` in input's dtype.

    Raises:
        ValueError: a shape, device, probability, activation or number of layers that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: ``backend`` names one that cannot serve the call.

    >>> import torch, fastattn
    >>> weights = [torch.randn(6, 8), torch.randn(3, 6)]
    >>> fastattn.mlp(torch.randn(4, 8), weights).shape
    torch.Size([4, 3])
    """
    weights, biases = _validate.numbered(weights, biases)
    _validate.tensor("input", input)
    _validate.activation(activation)
    dropout_p = _validate.probability("dropout_p", dropout_p)
    if activation != "relu" or dropout_p != 0.0:
        options = (activation, dropout_p)
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            input = linear(input, weight, bias, *options, backend=backend)
        return linear(input, weights[-1], biases[-1], backend=backend)
    input, *parameters = autocast(input, *weights, *biases)
    weights, biases = parameters[: len(weights)], parameters[len(weights) :]
    chosen = backends.select_layers("mlp", input, weights, backend)
    if chosen == "cpu" and backends.torch_multiplies(input, backend):
        _validate.layers(input, weights, biases)
        return reference.mlp(input, weights, biases)
    if op_validates(chosen) and not transforming():
        try:
            return apply(MLPFunction, input, len(weights), *weights, *biases)[0]
        except (RuntimeError, TypeError):
            _validate.layers(input, weights, biases)
            raise
    _validate.layers(input, weights, biases)
    if chosen == "reference":
        return reference.mlp(input, weights, biases)
    whole = chosen == "cpu" or (chosen == "cuda" and backends.fused_mlp(weights))
    if not whole or transforming():
        return layer_by_layer(input, weights, biases, backends.kernels_of(chosen))
    return apply(MLPFunction, input, len(weights), *weights, *biases)[0]


def gated_mlp(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor | None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    backend: str | None = None,
) -> Tensor:
    """down(activation(gate(input)) · up(input)): SwiGLU, GeGLU (Shazeer 2020, arXiv 2002.05202).

    Both products of input are one pass over it; the activation and the product of the two are their
    epilogue.

    Args:
        input: ``[..., in_features]``, floating point.
        gate_weight: ``[hidden_features, in_features]``, of input's dtype and device; under autocast
            the dtypes may differ, and all are cast.
        up_weight: ``[hidden_features, in_features]``.
        down_weight: ``[out_features, hidden_features]``, or None to return the gated product.
        gate_bias: ``[hidden_features]`` or None.
        up_bias: ``[hidden_features]`` or None.
        down_bias: ``[out_features]`` or None.
        activation: as in ``fastattn.linear``; None is the bilinear layer.
        backend: ``cpu``, ``reference``, or None for the kernels, or for torch's own product where
            that is faster.

    Returns:
        ``[..., out_features]``, or ``[..., hidden_features]`` without ``down_weight``, in input's
        dtype.

    Raises:
        ValueError: a shape, device or activation that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: ``backend`` names one that cannot serve the call.

    >>> import torch, fastattn
    >>> gate, up, down = torch.randn(24, 8), torch.randn(24, 8), torch.randn(8, 24)
    >>> fastattn.gated_mlp(torch.randn(4, 8), gate, up, down).shape
    torch.Size([4, 8])
    """
    _validate.tensor("input", input)
    _validate.activation(activation)
    given = (gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    input, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias = autocast(
        input, *given
    )
    if not _validate.usual_layers(input, (gate_weight, up_weight), (gate_bias, up_bias)):
        for name, weight, bias in (("gate", gate_weight, gate_bias), ("up", up_weight, up_bias)):
            _validate.linear(input, weight, bias, prefix=f"{name}_")
            _validate.width(input, weight, prefix=f"{name}_")
    if gate_weight.shape != up_weight.shape:
        raise ValueError(
            f"up_weight: expected gate_weight's shape {tuple(gate_weight.shape)}, got "
            f"{tuple(up_weight.shape)}"
        )
    tensors = (input, gate_weight, up_weight, gate_bias, up_bias)
    if _chosen(input, [gate_weight, up_weight], backend, op="gated_mlp") is not _By.KERNELS:
        hidden = reference.gated_linear(*tensors, activation=activation)
    else:
        hidden = apply(GatedLinearFunction, *tensors, activation, _save(*tensors))[0]
    if down_weight is None:
        return hidden
    _validate.linear(hidden, down_weight, down_bias, prefix="down_")
    _validate.width(hidden, down_weight, prefix="down_")
    return linear(hidden, down_weight, down_bias, backend=backend)
