"""The Triton kernels as torch ops, ``torch.ops.fastattn_triton``, with their fakes."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from fastattn.ops.triton import interpreting

_library = torch.library.Library("fastattn_triton", "DEF")

_ATTENTION = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? slopes, {}Tensor? seed, "
    "Tensor? starts_q, Tensor? starts_k, SymInt max_q, SymInt max_k, bool is_causal, float scale, "
    "float dropout_p, SymInt left, SymInt right, float softcap"
)
_RESULTS = "Tensor out, Tensor row_max, Tensor log_sum, "
_TANGENTS = "Tensor? t_query, Tensor? t_key, Tensor? t_value, Tensor? t_mask, "
_SCHEMAS = {
    "attention_forward": f"({_ATTENTION.format('')}) -> (Tensor, Tensor, Tensor, Tensor)",
    "attention_backward": (
        f"(Tensor grad_out, Tensor? grad_lse, {_ATTENTION.format(_RESULTS)}, "
        "bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "attention_jvp": f"({_ATTENTION.format(_TANGENTS + _RESULTS)}) -> (Tensor, Tensor)",
    "attention_double_backward": (
        "(Tensor grad_out, Tensor? grad_lse, "
        f"{_ATTENTION.format(_TANGENTS + _RESULTS)}, bool[5] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "linear_relu_forward": "(Tensor input, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
    "linear_relu_backward": (
        "(Tensor grad_out, Tensor input, Tensor weight, Tensor mask, bool[3] needs) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "linear_relu_jvp": (
        "(Tensor input, Tensor weight, Tensor mask, Tensor? t_input, Tensor? t_weight, "
        "Tensor? t_bias) -> Tensor"
    ),
}
_MODULES = {
    "attention_forward": "attention",
    "attention_backward": "attention",
    "attention_jvp": "attention_second_order",
    "attention_double_backward": "attention_second_order",
}


def _late(module: str, name: str) -> Callable:
    """The function, imported by its first call: importing Triton takes a second."""

    def call(*args):
        return getattr(importlib.import_module(f"fastattn.ops.triton.{module}"), name)(*args)

    return call


for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _module = _MODULES.get(_name, "linear_relu")
    _library.impl(_name, _late(_module, _name), "CUDA")
    if interpreting():
        _library.impl(_name, _late(_module, _name), "CPU")
