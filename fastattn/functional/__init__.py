"""The user's functions, and the autograd Functions that they call.

``scaled_dot_product_attention``, ``varlen_attn``, ``linear_relu``, ``mlp`` and
``dropout_add_norm`` check their arguments, choose a backend and call an autograd Function. The
Functions themselves, for code that has done both, are ``AttentionFunction``,
``LinearReLUFunction``, ``MLPFunction`` and ``DropoutAddNormFunction``.
"""

from fastattn.functional import _registration as _  # noqa: F401
from fastattn.functional.attention import AttentionFunction, scaled_dot_product_attention
from fastattn.functional.linear import LinearReLUFunction, MLPFunction, linear_relu, mlp
from fastattn.functional.norm import DropoutAddNormFunction, dropout_add_norm
from fastattn.functional.varlen import varlen_attn

__all__ = [
    "AttentionFunction",
    "DropoutAddNormFunction",
    "LinearReLUFunction",
    "MLPFunction",
    "dropout_add_norm",
    "linear_relu",
    "mlp",
    "scaled_dot_product_attention",
    "varlen_attn",
]
