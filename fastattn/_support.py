"""What the kernels of a backend cannot do: limits that hold whatever is known of this machine's
kernels."""

from __future__ import annotations

import torch

from fastattn import _extension
from fastattn._problem import Problem
from fastattn.ops import triton
from fastattn.ops.triton import config

_HOPPER = 90  # compute capability 9.0
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unsupported(problem: Problem, backend: str) -> list[str]:
    """Why ``backend`` does not serve ``problem``; empty where it does."""
    if backend == "reference":
        return []
    if backend == "cuda":
        return _unsupported_cuda(problem)
    return _unsupported_triton(problem) if backend == "triton" else _unsupported_cpu(problem)


def _unsupported_cpu(problem: Problem) -> list[str]:
    found = []
    if not _extension.HAS_NATIVE:
        found.append(f"the native library is not loaded ({_extension.load_failure()})")
    if problem.device != "cpu":
        found.append(f"the inputs are on {problem.device}")
    if problem.dtype not in _DTYPES:
        found.append(f"{problem.dtype} is not one of float32, float64, bfloat16, float16")
    if problem.slopes_gradient:
        found.append("the cpu kernels give alibi_slopes no gradient")
    return found


def _unsupported_cuda(problem: Problem) -> list[str]:
    found = []
    if not _extension.HAS_CUDA:
        found.append(f"the CUDA kernels are not loaded ({_extension.cuda_load_failure()})")
    if problem.device != "cuda":
        found.append(f"the inputs are on {problem.device}")
    elif (capability := capability_of(problem.gpu)) != _HOPPER:
        found.append(
            f"compute capability {capability / 10:.1f} is not 9.0 (Triton serves other GPUs)"
        )
    if problem.dtype not in (torch.bfloat16, torch.float16):
        found.append(f"{problem.dtype} is not one of bfloat16, float16")
    if problem.op == "varlen_attn":
        found.append("it has no kernel for packed sequences")
    most = 128 if problem.gradient else 256
    if problem.head_dim > most:
        found.append(
            f"head dim {problem.head_dim} is above {most}{' with gradients' * (most == 128)}"
        )
    if problem.extras:
        found.append(f"it has no {', no '.join(problem.extras)}")
    return found


@torch.compiler.assume_constant_result
def capability_of(gpu: int | None = None) -> int:
    return triton.capability(torch.cuda.current_device() if gpu is None else gpu)


def _unsupported_triton(problem: Problem) -> list[str]:
    found = []
    if problem.device != "cuda" and not (problem.device == "cpu" and triton.interpreting()):
        found.append(f"the inputs are on {problem.device}")
    elif missing := triton.load_failure():
        found.append(missing)
    elif problem.device == "cuda" and not torch.compiler.is_compiling():
        gpu, size = capability_of(problem.gpu), problem.dtype.itemsize
        against = config.unsupported(gpu, size, problem.head_dim)
        found += [against] if against is not None else []
    if problem.op in ("multi_linear", "gated_mlp"):
        found.append("it has no kernel for several weights on one input")
    if problem.dtype not in _DTYPES:
        found.append(f"{problem.dtype} is not one of float32, float64, bfloat16, float16")
    if problem.head_dim > triton.MAX_HEAD_DIM:
        found.append(f"head dim {problem.head_dim} is above {triton.MAX_HEAD_DIM}")
    if problem.slopes_gradient:
        found.append("the triton kernels give alibi_slopes no gradient")
    return found
