"""Triton kernels for any CUDA GPU; under ``TRITON_INTERPRET=1`` they run on CPU tensors.

Importing this package neither imports Triton nor fails without it: the kernels are imported by the
first call that needs them.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

MAX_HEAD_DIM = 256  # of attention


@functools.cache
def load_failure() -> str | None:
    """Why the Triton kernels cannot be used on this machine; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    try:
        import triton
        import triton.language
    except Exception as error:  # a broken install raises anything
        return f"triton does not import: {error}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return f"triton {triton.__version__} is older than 3.6"
    return None


@functools.cache
def capability(device: int) -> int:
    """The compute capability of a GPU, 10 x major + minor."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter, and hence on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
