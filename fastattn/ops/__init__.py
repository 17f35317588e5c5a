"""The registered ops, without autograd, and what they return for fake tensors."""

from fastattn.ops import flops as _  # noqa: F401
from fastattn.ops.attention import (
    NO_OPTIONS,
    Options,
    attention_backward,
    attention_double_backward,
    attention_forward,
    attention_jvp,
)
from fastattn.ops.linear import (
    linear_relu_backward,
    linear_relu_forward,
    linear_relu_jvp,
    mlp_backward,
    mlp_forward,
    mlp_inference,
)

__all__ = [
    "NO_OPTIONS",
    "Options",
    "attention_backward",
    "attention_double_backward",
    "attention_forward",
    "attention_jvp",
    "linear_relu_backward",
    "linear_relu_forward",
    "linear_relu_jvp",
    "mlp_backward",
    "mlp_forward",
    "mlp_inference",
]
