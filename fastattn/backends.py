"""Which backend serves a call, and why the others do not.

A backend's limits are the reasons it gives against a problem; the first backend without one is
taken. An explicit backend is obeyed or raises with its reasons.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import _extension
from fastattn.ops import triton
from fastattn.ops.triton.config import fused_product, why_not

BACKENDS = ("cpu", "cuda", "triton", "reference")
OPS = ("attention", "varlen_attn", "linear_relu", "mlp")

_HOPPER = 90  # compute capability 9.0
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_default = os.environ.get("FASTATTN_BACKEND") or None
_warned: set[tuple[str, str]] = set()
_served_by_cpu: set[Problem] = set()


class FastAttnWarning(UserWarning):
    """The O(S²) reference backend was taken because no kernel serves the call."""


class Problem(NamedTuple):
    """What a backend must know to say whether it serves a call."""

    op: str
    device: str
    dtype: torch.dtype
    head_dim: int = 0  # the larger of D and Dv
    slopes_gradient: bool = False
    gradient: bool = False  # autograd will ask for one of q, k, v
    extras: tuple[str, ...] = ()  # what cuda does not do; not looked for on other devices
    gpu: int | None = None  # on device "cuda"; None is the current one


@dataclass(frozen=True)
class Explanation:
    """The backend chosen for a call, and the reasons against each of the others."""

    op: str
    backend: str
    reasons: dict[str, list[str]]
    detail: str = ""  # how the backend goes about it

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}{self.detail and f' ({self.detail})'}"]
        for name, reasons in self.reasons.items():
            if name != self.backend:
                lines.append(f"  not {name}: {'; '.join(reasons) or 'comes after ' + self.backend}")
        return "\n".join(lines)


def reasons(problem: Problem, backend: str) -> list[str]:
    """Why ``backend`` does not serve ``problem``; empty where it does."""
    if backend == "reference":
        return []
    if backend == "cuda":
        return _cuda_reasons(problem)
    return _triton_reasons(problem) if backend == "triton" else _cpu_reasons(problem)


def _cpu_reasons(problem: Problem) -> list[str]:
    found = []
    if not _extension.HAS_NATIVE:
        found.append(f"the native library is not loaded ({_extension.why_not()})")
    if problem.device != "cpu":
        found.append(f"the inputs are on {problem.device}")
    if problem.dtype not in _DTYPES:
        found.append(f"{problem.dtype} is not one of float32, float64, bfloat16, float16")
    if problem.slopes_gradient:
        found.append("the cpu kernels give alibi_slopes no gradient")
    return found


def _cuda_reasons(problem: Problem) -> list[str]:
    found = []
    if not _extension.HAS_CUDA:
        found.append(f"the CUDA kernels are not loaded ({_extension.why_not_cuda()})")
    if problem.device != "cuda":
        found.append(f"the inputs are on {problem.device}")
    elif (capability := _capability(problem.gpu)) != _HOPPER:
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
def _capability(gpu: int | None = None) -> int:
    return triton.capability(torch.cuda.current_device() if gpu is None else gpu)


def _triton_reasons(problem: Problem) -> list[str]:
    found = []
    if problem.device != "cuda" and not (problem.device == "cpu" and triton.interpreting()):
        found.append(f"the inputs are on {problem.device}")
    elif triton.why_not() is not None:
        found.append(triton.why_not())
    elif problem.device == "cuda" and not torch.compiler.is_compiling():
        against = why_not(_capability(problem.gpu), problem.dtype.itemsize, problem.head_dim)
        found += [against] if against is not None else []
    if problem.dtype not in _DTYPES:
        found.append(f"{problem.dtype} is not one of float32, float64, bfloat16, float16")
    if problem.head_dim > triton.MAX_HEAD_DIM:
        found.append(f"head dim {problem.head_dim} is above {triton.MAX_HEAD_DIM}")
    if problem.slopes_gradient:
        found.append("the triton kernels give alibi_slopes no gradient")
    return found


def select(problem: Problem, backend: str | None = None) -> str:
    """The backend for ``problem``: ``backend``, or ``FASTATTN_BACKEND``, or the first without a
    reason against it.

    Raises ValueError for an unknown backend and RuntimeError, with the reasons, for one that
    cannot serve the call.
    """
    explicit = backend if backend is not None else _default
    compiling = torch.compiler.is_compiling()
    if explicit is None and not compiling and problem in _served_by_cpu:
        return "cpu"
    if explicit is not None:
        if explicit not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {explicit!r}")
        against = reasons(problem, explicit)
        if against:
            raise RuntimeError(
                f"backend {explicit!r} cannot serve {problem.op}: {'; '.join(against)}"
            )
        return explicit
    against = []
    for name in ("cpu",) if problem.device == "cpu" else ("cuda", "triton"):
        against = reasons(problem, name)
        if not against:
            if name == "cpu" and not compiling:
                _served_by_cpu.add(problem)  # nothing about it can change
            return name
    if not compiling:
        _warn_reference(problem, against)
    return "reference"


def _warn_reference(problem: Problem, against: list[str]) -> None:
    message = f"{problem.op} runs on the O(S²) reference backend: {'; '.join(against)}"
    if (problem.op, message) not in _warned:
        _warned.add((problem.op, message))
        warnings.warn(message, FastAttnWarning, stacklevel=4)


def available() -> list[str]:
    """The backends that can serve anything on this machine."""
    found = ["cpu"] if _extension.HAS_NATIVE else []
    if _extension.HAS_CUDA and torch.cuda.is_available() and _capability() == _HOPPER:
        found.append("cuda")
    if (torch.cuda.is_available() or triton.interpreting()) and triton.why_not() is None:
        found.append("triton")
    return [*found, "reference"]


def explain(op: str, *args: Tensor, backend: str | None = None, **options: object) -> Explanation:
    """Which backend serves ``op`` (one of ``attention``, ``varlen_attn``, ``linear_relu``,
    ``mlp``) with these arguments, and why not the others. Nothing is computed."""
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not tensors:
        raise TypeError("args: expected the op's tensors, got none")
    if op in ("attention", "varlen_attn"):
        if len(tensors) < 3:
            raise TypeError(f"args: expected query, key, value, got {len(tensors)} tensors")
        names = ("attn_mask", "dropout_p", "is_causal", "scale") if op == "attention" else ()
        call = dict(zip(names, args[3:], strict=False)) | options
        problem = attention_problem(op, *tensors[:3], **call)
    else:
        weights = tensors[1:2] if op == "linear_relu" else next(iter(args[1:]), ())
        problem = linear_problem(op, tensors[0], weights)
    against = {name: reasons(problem, name) for name in BACKENDS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastAttnWarning)
        chosen = select(problem, backend)
    detail = ""
    if chosen == "cuda" and op == "mlp":
        detail = "one kernel for all layers" if fused_mlp(weights) else "a layer at a time"
    if chosen == "triton" and op in ("linear_relu", "mlp") and len(tensors) > 1:
        input, weight = tensors[:2]
        rows = input.numel() // max(1, input.shape[-1])
        fused = fused_product(rows, *weight.shape, input.element_size())
        detail = "one fused kernel" if fused else "cuBLAS and a kernel for the ReLU and its bits"
    return Explanation(op, chosen, against, detail)


def attention_problem(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    **_: object,
) -> Problem:
    """The Problem of an attention call."""
    device = query.device.type
    slopes_gradient = needs_gradient(alibi_slopes)
    head_dim = max(query.shape[-1], value.shape[-1])
    if device != "cuda":
        return Problem(op, device, query.dtype, head_dim, slopes_gradient)
    extras = {
        "dropout": dropout_p > 0.0,
        "softcap": softcap != 0.0,
        "ALiBi slopes": alibi_slopes is not None,
        "scale of 0 or less": scale is not None and not scale > 0.0,
        "head dim of 0": min(query.shape[-1], value.shape[-1]) == 0,
        "extents of 2^29 and more": max(query.shape[-2], key.shape[-2]) >= 2**29
        or math.prod(query.shape[:-2]) >= 2**29,
    }
    if attn_mask is not None:
        over_keys = isinstance(attn_mask, Tensor) and math.prod(attn_mask.shape[-3:-1]) == 1
        extras["float mask"] = attn_mask.dtype != torch.bool
        extras["mask that differs between heads or queries"] = not over_keys
    gradient = any(map(needs_gradient, (query, key, value)))
    against = tuple(name for name, there in extras.items() if there)
    gpu = query.device.index
    return Problem(op, device, query.dtype, head_dim, slopes_gradient, gradient, against, gpu)


def linear_problem(op: str, input: Tensor, weights: Sequence[Tensor]) -> Problem:
    """The Problem of a linear+ReLU or MLP call."""
    device = input.device.type
    if device != "cuda":
        return Problem(op, device, input.dtype)
    tensors = [x for x in (input, *weights) if isinstance(x, Tensor)]
    extras = {
        "sizes of 0": any(x.numel() == 0 for x in tensors),
        "extents of 2^30 and more": any(
            max(math.prod(x.shape[:-1]), *x.shape[-1:]) >= 2**30 for x in tensors if x.dim()
        ),
    }
    against = tuple(name for name, there in extras.items() if there)
    return Problem(op, device, input.dtype, extras=against, gpu=input.device.index)


def fused_mlp(weights: Sequence[Tensor]) -> bool:
    """Whether cuda takes all layers of an MLP in one kernel; else it takes one at a time."""
    return len(weights) <= 8 and all(w.shape[0] <= 256 for w in weights)


def needs_gradient(x: Tensor | None) -> bool:
    """Whether autograd will ask for x's gradient."""
    if x is None:
        return False
    return (x.requires_grad and torch.is_grad_enabled()) or _has_tangent(x)


def _has_tangent(x: Tensor) -> bool:
    """Whether forward mode will ask for x's part."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None
