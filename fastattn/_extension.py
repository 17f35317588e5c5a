"""Loads the native libraries that were built. Importing this module never fails; using a library
says why it cannot."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).parent
# FASTATTN_LIBRARIES names another folder of libraries than the package: one that was built on
# another machine (`make gpu-bundle`). FASTATTN_CUDA_VARIANT names a build of the CUDA library in
# it.
_LIBRARIES = Path(os.environ.get("FASTATTN_LIBRARIES") or _PACKAGE)
_VARIANT = os.environ.get("FASTATTN_CUDA_VARIANT", "")


def _read_build_info() -> dict:
    try:
        return json.loads((_LIBRARIES / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {
            "native": False,
            "reason": f"no library was built in {_LIBRARIES}",
            "hint": "pip install ., or correct FASTATTN_LIBRARIES",
        }


def _load() -> str | None:
    """Loads the library; returns why it could not be, and what to do, or None."""
    if not build_info.get("native"):
        return f"{build_info.get('reason')}; {build_info.get('hint')}"
    try:
        torch.ops.load_library(str(_LIBRARIES / "_ops.so"))
        if _facts is not None:
            _facts.cpu_isa()  # an unusable FASTATTN_CPU_ISA shows here
    except (OSError, RuntimeError) as error:
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
        torch.ops.load_library(str(cuda_library()))
    except OSError as error:
        return f"{error}; reinstall with torch {torch.__version__}"
    return None


def cuda_library() -> Path:
    """The file of the CUDA kernels, whether or not it is there."""
    return _LIBRARIES / (f"_cuda_{_VARIANT}.so" if _VARIANT else "_cuda.so")


def _load_facts() -> ModuleType | None:
    """The module of facts about the processor. It is built for one version of Python; the kernels
    do without it."""
    try:
        return importlib.import_module("fastattn._C")
    except ImportError:
        return None


build_info: dict = _read_build_info()
_facts: ModuleType | None = _load_facts()
_failure: str | None = _load()
HAS_NATIVE: bool = _failure is None
_cuda_failure: str | None = _load_cuda()
HAS_CUDA: bool = _cuda_failure is None


def load_failure() -> str | None:
    """Why the native library is missing and what to do about it; None when it is loaded."""
    return _failure


def cuda_load_failure() -> str | None:
    """Why the CUDA kernels are missing and what to do about it; None when they are loaded."""
    return _cuda_failure


def cpu_isa() -> str | None:
    """The kernel set in use (``avx512bf16``, ``avx512``, ``avx2``, ``generic``), or None without
    the native library or its module for this version of Python."""
    return _facts.cpu_isa() if HAS_NATIVE and _facts is not None else None


def cpu_features() -> list[str]:
    """The SIMD extensions of this processor that the kernels know of."""
    return _facts.cpu_features() if HAS_NATIVE and _facts is not None else []
