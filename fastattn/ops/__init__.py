"""The registered ops, without autograd, and what they return for fake tensors."""

from fastattn._call import (
    NATIVE,
    Call,
    Cotangents,
    Extras,
    Inputs,
    Options,
    Results,
    Tangents,
    split,
)
from fastattn.ops import flops
from fastattn.ops.attention import (
    attention_backward,
    attention_double_backward,
    attention_forward,
    attention_jvp,
)
from fastattn.ops.linear import (
    ACTIVATIONS,
    activation_backward,
    activation_forward,
    gated_linear_forward,
    linear_backward,
    linear_forward,
    linear_relu_backward,
    linear_relu_forward,
    linear_relu_jvp,
    mlp_backward,
    mlp_forward,
    mlp_inference,
    pack_weight,
)
from fastattn.ops.norm import dropout_add_norm_backward, dropout_add_norm_forward
from fastattn.ops.training import LOSSES, OPTIMIZERS, LossOptions, Rule, training_step
from fastattn.ops.triton import library

flops.register()
_triton = library.register()

__all__ = [
    "ACTIVATIONS",
    "LOSSES",
    "NATIVE",
    "OPTIMIZERS",
    "Call",
    "Cotangents",
    "Extras",
    "Inputs",
    "LossOptions",
    "Options",
    "Results",
    "Rule",
    "Tangents",
    "activation_backward",
    "activation_forward",
    "attention_backward",
    "attention_double_backward",
    "attention_forward",
    "attention_jvp",
    "dropout_add_norm_backward",
    "dropout_add_norm_forward",
    "gated_linear_forward",
    "linear_backward",
    "linear_forward",
    "linear_relu_backward",
    "linear_relu_forward",
    "linear_relu_jvp",
    "mlp_backward",
    "mlp_forward",
    "mlp_inference",
    "pack_weight",
    "split",
    "training_step",
]
