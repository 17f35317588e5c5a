"""The oracle: every equation of DESIGN.md in plain torch, O(S²) memory, any dtype and device.

The functions compute in float32 (float64 for float64) and return the inputs' dtype. ``attention``,
``linear_relu`` and ``mlp`` are differentiable by autograd any number of times; the functions named
after a derivative write its formulas out and are what the kernels are compared with.
"""

from fastattn.reference.attention import (
    Setting,
    attention,
    attention_backward,
    attention_double_backward,
    attention_forward,
    attention_in,
    attention_jvp,
    attention_weights,
)
from fastattn.reference.linear import (
    linear_relu,
    linear_relu_backward,
    linear_relu_forward,
    linear_relu_jvp,
    mlp,
)
from fastattn.reference.philox import philox, philox_keep_mask

__all__ = [
    "Setting",
    "attention",
    "attention_backward",
    "attention_double_backward",
    "attention_forward",
    "attention_in",
    "attention_jvp",
    "attention_weights",
    "linear_relu",
    "linear_relu_backward",
    "linear_relu_forward",
    "linear_relu_jvp",
    "mlp",
    "philox",
    "philox_keep_mask",
]
