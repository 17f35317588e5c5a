"""Loads the native libraries that were built. Importing this module never fails; using a library
says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent


def _read_build_info() -> dict:
    try:
        return json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {"native": False, "reason": "the package was never built", "hint": "pip install ."}


def _load() -> str | None:
    """Loads the library; returns why it could not be, and what to do, or None."""
    if not build_info.get("native"):
        return f"{build_info.get('reason')}; {build_info.get('hint')}"
    try:
        torch.ops.load_library(str(_PACKAGE / "_ops.so"))
        from fastattn import _C

        _C.cpu_isa()  # an unusable FASTATTN_CPU_ISA shows here
    except (OSError, ImportError, RuntimeError) as error:
        return f"{error}; if no setting is at fault, reinstall with torch {torch.__version__}"
    return None


def _load_cuda() -> str | None:
    """Loads the CUDA kernels, whether or not there is a GPU; returns why they could not be."""
    facts = build_info.get("cuda") or {}
    if not facts.get("built"):
        return "; ".join(filter(None, [facts.get("reason"), facts.get("hint")])) or "never built"
    if not HAS_NATIVE:
        return "the native library is not loaded"
    try:
        torch.ops.load_library(str(_PACKAGE / "_cuda.so"))
    except OSError as error:
        return f"{error}; reinstall with torch {torch.__version__}"
    return None


build_info: dict = _read_build_info()
_failure: str | None = _load()
HAS_NATIVE: bool = _failure is None
_cuda_failure: str | None = _load_cuda()
HAS_CUDA: bool = _cuda_failure is None


def why_not() -> str | None:
    """Why the native library is missing and what to do about it; None when it is loaded."""
    return _failure


def why_not_cuda() -> str | None:
    """Why the CUDA kernels are missing and what to do about it; None when they are loaded."""
    return _cuda_failure


def cpu_isa() -> str | None:
    """The kernel set in use (``avx512bf16``, ``avx512``, ``avx2``, ``generic``), or None without
    the native library."""
    if not HAS_NATIVE:
        return None
    from fastattn import _C

    return _C.cpu_isa()


def cpu_features() -> list[str]:
    """The SIMD extensions of this processor that the kernels know of."""
    if not HAS_NATIVE:
        return []
    from fastattn import _C

    return _C.cpu_features()
