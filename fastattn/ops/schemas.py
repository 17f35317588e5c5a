"""The schemas of all ops: one text for ``torch.ops.fastattn``, whose kernels are C++ and registered
for their device in csrc, and for ``torch.ops.fastattn_triton``."""

from __future__ import annotations

import torch

_COTANGENTS = "Tensor grad_out, Tensor? grad_lse"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask"
_EXTRAS = "Tensor? slopes, Tensor? seed, Tensor? starts_q, Tensor? starts_k"
_TANGENTS = "Tensor? t_query, Tensor? t_key, Tensor? t_value, Tensor? t_mask"
_RESULTS = "Tensor out, Tensor row_max, Tensor log_sum"
_OPTIONS = (
    "bool is_causal, float scale, float dropout_p, SymInt left, SymInt right, float softcap, "
    "SymInt max_q, SymInt max_k"
)
_DIFFERENTIATED = f"{_INPUTS}, {_EXTRAS}, {_TANGENTS}, {_RESULTS}, {_OPTIONS}"

# Those that both namespaces have.
SHARED = {
    "attention_forward": (
        f"({_INPUTS}, {_EXTRAS}, {_OPTIONS}) "
        "-> (Tensor out, Tensor lse, Tensor row_max, Tensor log_sum)"
    ),
    "attention_backward": (
        f"({_COTANGENTS}, {_INPUTS}, {_EXTRAS}, {_RESULTS}, {_OPTIONS}, bool[4] needs) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)"
    ),
    "attention_jvp": f"({_DIFFERENTIATED}) -> (Tensor t_out, Tensor t_lse)",
    "attention_double_backward": (
        f"({_COTANGENTS}, {_DIFFERENTIATED}, bool[5] needs) -> (Tensor t_out, Tensor t_lse, "
        "Tensor g_query, Tensor g_key, Tensor g_value, Tensor g_mask)"
    ),
    "activation_forward": (
        "(Tensor input, int activation, float dropout_p, Tensor? seed) -> Tensor"
    ),
    "activation_backward": (
        "(Tensor grad_out, Tensor input, int activation, float dropout_p, Tensor? seed) -> Tensor"
    ),
    "linear_relu_forward": (
        "(Tensor input, Tensor weight, Tensor? bias) -> (Tensor out, Tensor mask)"
    ),
    "linear_relu_backward": (
        "(Tensor grad_out, Tensor input, Tensor weight, Tensor mask, bool[3] needs) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    ),
    "linear_relu_jvp": (
        "(Tensor input, Tensor weight, Tensor mask, Tensor? t_input, Tensor? t_weight, "
        "Tensor? t_bias) -> Tensor"
    ),
    "dropout_add_norm_forward": (
        "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
        "float dropout_p, float eps, bool rms) "
        "-> (Tensor out, Tensor sum, Tensor mean, Tensor rstd)"
    ),
    "dropout_add_norm_backward": (
        "(Tensor? grad_out, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor mean, "
        "Tensor rstd, Tensor? seed, float dropout_p, bool rms, bool[4] needs) "
        "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)"
    ),
}
NATIVE = SHARED | {
    "linear_forward": (
        "(Tensor input, Tensor[] weights, Tensor[] biases, Tensor[] packed, int activation, "
        "float dropout_p, Tensor? seed, bool save) -> Tensor[]"
    ),
    "pack_weight": "(Tensor weight) -> Tensor",
    "gated_linear_forward": (
        "(Tensor input, Tensor gate_weight, Tensor weight, Tensor? gate_bias, Tensor? bias, "
        "int activation, bool save) -> (Tensor out, Tensor of_gate, Tensor of_up)"
    ),
    "linear_backward": (
        "(Tensor[] grads, Tensor input, Tensor[] weights, Tensor[] saved, float dropout_p, "
        "bool[] needs) -> Tensor[]"
    ),
    "mlp_forward": "(Tensor input, Tensor[] weights, Tensor[] biases) -> Tensor[]",
    "mlp_inference": "(Tensor input, Tensor[] weights, Tensor[] biases) -> Tensor",
    "mlp_backward": (
        "(Tensor grad_out, Tensor input, Tensor[] weights, Tensor[] hidden, bool[] needs) "
        "-> Tensor[]"
    ),
    "training_step": (
        "(Tensor input, Tensor targets, Tensor(a!)[] parameters, Tensor(b!)[] states, "
        "Tensor rules, bool[] relus, int optimizer, int loss, bool mean, Tensor? class_weights, "
        "int ignore_index, float label_smoothing) -> Tensor"
    ),
    "fma_probe": "(Tensor like, int iterations) -> int",
}
NAMESPACES = {"fastattn": NATIVE, "fastattn_triton": SHARED}


def _define(namespace: str, schemas: dict[str, str]) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for name, schema in schemas.items():
        library.define(name + schema)
    return library


_libraries = [_define(*item) for item in NAMESPACES.items()]  # the ops end with their libraries
