"""The Triton kernels behind ``torch.ops.fastattn_triton``."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from fastattn.ops import schemas
from fastattn.ops.triton import interpreting

_MODULES = {
    "attention_forward": "attention",
    "attention_backward": "attention",
    "attention_jvp": "attention_second_order",
    "attention_double_backward": "attention_second_order",
    "activation_forward": "activation",
    "activation_backward": "activation",
    "dropout_add_norm_forward": "norm",
    "dropout_add_norm_backward": "norm",
}


def _late(module: str, name: str) -> Callable:
    """The function, imported by its first call: importing Triton takes a second."""

    def call(*args):
        return getattr(importlib.import_module(f"fastattn.ops.triton.{module}"), name)(*args)

    return call


def register() -> torch.library.Library:
    """The kernels end with the library that is returned."""
    library = torch.library.Library("fastattn_triton", "IMPL")
    for name in schemas.SHARED:
        kernel = _late(_MODULES.get(name, "linear_relu"), name)
        library.impl(name, kernel, "CUDA")
        if interpreting():
            library.impl(name, kernel, "CPU")
    return library
