"""Fused linear+ReLU and softmax attention for PyTorch, under one contract on every backend.

- Functions: ``scaled_dot_product_attention``, ``varlen_attn``, ``linear``, ``linear_relu``,
  ``multi_linear``, ``mlp``, ``gated_mlp``, ``activation_dropout``, ``dropout_add_norm``.
- Modules with torch.nn's arguments and parameter names: ``fastattn.nn``.
- Models that exist already: ``plan``, ``patch`` and ``unpatch``; ``torch.compile(model,
  backend="fastattn")`` and ``compile_report``; ``override_sdpa``.
- The training step of a small network as one call: ``fastattn.training.TrainingStep``.
- Which backend serves a call, and why: ``fastattn.backends.explain``, or ``fastattn doctor`` in a
  shell.

>>> import torch, fastattn
>>> query, key, value = torch.randn(3, 2, 8, 16, 64)  # each [batch, heads, sequence, head dim]
>>> fastattn.scaled_dot_product_attention(query, key, value, is_causal=True).shape
torch.Size([2, 8, 16, 64])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastattn import backends, functional
from fastattn.backends import FastAttnWarning
from fastattn.functional import (
    activation_dropout,
    dropout_add_norm,
    gated_mlp,
    linear,
    linear_relu,
    mlp,
    multi_linear,
    pack_weights,
    scaled_dot_product_attention,
    varlen_attn,
)

__version__ = "0.1.0"

# Loaded on first use, so that importing fastattn stays quick.
_LAZY = {
    "nn": "fastattn.nn",
    "integrations": "fastattn.integrations",
    "training": "fastattn.training",
    "patch": "fastattn.integrations.torch_nn",
    "unpatch": "fastattn.integrations.torch_nn",
    "plan": "fastattn.integrations.torch_nn",
    "Plan": "fastattn.integrations.torch_nn",
    "PatchReport": "fastattn.integrations.torch_nn",
    "override_sdpa": "fastattn.integrations.sdpa",
    "compile_report": "fastattn.integrations.compiler",
    "CompileReport": "fastattn.integrations.compiler",
}

__all__ = [
    "CompileReport",
    "FastAttnWarning",
    "PatchReport",
    "Plan",
    "__version__",
    "activation_dropout",
    "backends",
    "compile_report",
    "dropout_add_norm",
    "functional",
    "gated_mlp",
    "integrations",
    "linear",
    "linear_relu",
    "mlp",
    "multi_linear",
    "nn",
    "override_sdpa",
    "pack_weights",
    "patch",
    "plan",
    "scaled_dot_product_attention",
    "training",
    "unpatch",
    "varlen_attn",
]

if TYPE_CHECKING:
    from fastattn import integrations as integrations
    from fastattn import nn as nn
    from fastattn import training as training
    from fastattn.integrations.compiler import CompileReport as CompileReport
    from fastattn.integrations.compiler import compile_report as compile_report
    from fastattn.integrations.sdpa import override_sdpa as override_sdpa
    from fastattn.integrations.torch_nn import PatchReport as PatchReport
    from fastattn.integrations.torch_nn import Plan as Plan
    from fastattn.integrations.torch_nn import patch as patch
    from fastattn.integrations.torch_nn import plan as plan
    from fastattn.integrations.torch_nn import unpatch as unpatch
else:

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
        module = importlib.import_module(_LAZY[name])
        return module if name in ("nn", "integrations", "training") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
