"""The user's functions, and the autograd Functions that they call.

``scaled_dot_product_attention``, ``varlen_attn``, ``linear``, ``linear_relu``, ``multi_linear``,
``mlp``, ``gated_mlp``, ``activation_dropout`` and ``dropout_add_norm`` check their arguments,
choose a backend and call an autograd Function. The Functions themselves, for code that has done
both, are ``AttentionFunction``, ``LinearFunction``, ``LinearReLUFunction``,
``GatedLinearFunction``, ``ActivationFunction``, ``MLPFunction`` and ``DropoutAddNormFunction``.
"""

from fastattn.functional import _registration as _  # noqa: F401
from fastattn.functional.attention import AttentionFunction, scaled_dot_product_attention
from fastattn.functional.layer_functions import (
    ActivationFunction,
    GatedLinearFunction,
    LinearFunction,
)
from fastattn.functional.layers import activation_dropout, gated_mlp, linear, mlp, multi_linear
from fastattn.functional.norm import DropoutAddNormFunction, dropout_add_norm
from fastattn.functional.packing import pack_weights, packed_bytes
from fastattn.functional.relu_layers import LinearReLUFunction, MLPFunction, linear_relu
from fastattn.functional.varlen import varlen_attn

__all__ = [
    "ActivationFunction",
    "AttentionFunction",
    "DropoutAddNormFunction",
    "GatedLinearFunction",
    "LinearFunction",
    "LinearReLUFunction",
    "MLPFunction",
    "activation_dropout",
    "dropout_add_norm",
    "gated_mlp",
    "linear",
    "linear_relu",
    "mlp",
    "multi_linear",
    "pack_weights",
    "packed_bytes",
    "scaled_dot_product_attention",
    "varlen_attn",
]
