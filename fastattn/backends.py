"""Which backend serves a call, and why the others do not.

Each backend gives its reasons against a problem; a backend without a reason serves it. A call goes
to the first backend that serves it and whose kernels have been verified. A backend that the call
names is obeyed, or raises with its reasons.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import _products, ops
from fastattn._problem import Problem, attention_problem, computed_dtype, fused_mlp, linear_problem
from fastattn._problem import rows_problem as rows_problem
from fastattn._support import unsupported
from fastattn.ops import triton
from fastattn.ops.triton import config
from fastattn.verification import first_use

KERNELS = ("cpu", "cuda", "triton")
BACKENDS = (*KERNELS, "reference")
OPS = (
    "attention", "varlen_attn", "linear", "linear_relu", "mlp", "activation_dropout",
    "dropout_add_norm",
)  # fmt: skip

# The families of CUDA kernels (attention_forward, attention_backward, linear_relu, mlp) that come
# before Triton's by default: those right, and faster, in a table of benchmarks/results/.
PROVEN_ON_HARDWARE: frozenset[str] = frozenset()


def _switch(name: str, default: str) -> bool:
    """An environment variable that is 0 or 1."""
    value = os.environ.get(name) or default
    if value not in ("0", "1"):
        raise ValueError(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1"


def _named_backend() -> str | None:
    """The backend that the environment names for every call."""
    name = os.environ.get("FASTATTN_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"FASTATTN_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_cuda_first = _switch("FASTATTN_CUDA", "0")
self_check = _switch("FASTATTN_SELF_CHECK", "1")

_default = _named_backend()
_warned: set[str] = set()
_served_by_cpu: set[Problem] = set()
_layers_on_cpu: set[tuple[str, torch.dtype]] = set()  # op and dtype of calls that cpu served
_verdicts: dict[tuple[str, Problem], list[str]] = {}  # of the self-check, where it is done


class FastAttnWarning(UserWarning):
    """The O(S²) reference backend was taken because no kernel serves the call, a kernel failed its
    self-check, or a model that was to skip its padding could not."""


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


def families(problem: Problem, backend: str) -> tuple[str, ...]:
    """The families of kernels that compute the call and its gradient on ``backend``."""
    if problem.op == "attention":
        return ("attention_forward", "attention_backward")[: 1 + problem.gradient]
    if problem.op == "linear":
        return ("linear_relu",)
    if problem.op == "mlp":  # on cuda one kernel, or a layer at a time; elsewhere the latter
        return ("linear_relu", "mlp") if backend == "cuda" else ("linear_relu",)
    return (problem.op,)


def _unproven(problem: Problem, backend: str) -> list[str]:
    """Why a backend that serves the call is not taken unless it is named."""
    if backend != "cuda" or _cuda_first or PROVEN_ON_HARDWARE.issuperset(families(problem, "cuda")):
        return []
    return [
        "it has not been verified on hardware yet; name it (backend='cuda' or FASTATTN_CUDA=1) to "
        "use it"
    ]


def _failures(problem: Problem, backend: str, run: bool = True) -> list[str]:
    """The call's kernels that are wrong on this GPU, after a check if ``run``; a failure warns."""
    if problem.device != "cuda" or backend == "reference" or not self_check:
        return []
    of = families(problem, backend)
    if torch.compiler.is_compiling():
        return _known_failures(backend, of, problem.gpu)
    verdict = _verdicts.get((backend, problem))
    if verdict is not None:
        return verdict
    kernels = [first_use.kernel_of(backend, f, problem.dtype, problem.head_dim) for f in of]
    if run:
        found = {kernel: first_use.check(kernel, problem.gpu) for kernel in kernels}
    else:
        known = first_use.known(problem.gpu)
        found = {kernel: known.get(kernel) for kernel in kernels}
    failed = {kernel: failure for kernel, failure in found.items() if failure}
    against = [
        f"its kernel {kernel} failed the self-check on this GPU ({failure})"
        for kernel, failure in failed.items()
    ]
    if run and None not in found.values():
        _verdicts[backend, problem] = against
    if run:
        for reason in against:
            warn_once(
                f"{backend}: {reason}. It is used only where backend={backend!r} is given. Please "
                "send the output of `fastattn doctor --check` to the project's issue tracker; "
                "FASTATTN_SELF_CHECK=0 turns the self-check off",
                5,
            )
    return against


@torch.compiler.assume_constant_result
def _known_failures(backend: str, of: tuple[str, ...], gpu: int | None) -> list[str]:
    """The failures of any dtype and head dim, which the compiler may hold as symbols."""
    return [
        f"its kernel {kernel} failed the self-check on this GPU ({failure})"
        for kernel, failure in first_use.known(gpu).items()
        if failure and kernel.backend == backend and kernel.family in of
    ]


def unsupported_by_default(problem: Problem, backend: str) -> list[str]:
    """Why a call that names no backend does not go to ``backend``. Nothing is computed."""
    against = unsupported(problem, backend)
    if against or _default is not None:
        return against
    return _unproven(problem, backend) or _failures(problem, backend, run=False)


def serves(problem: Problem) -> bool:
    """Whether a kernel, not the reference, serves a call that names no backend."""
    return any(not unsupported_by_default(problem, name) for name in _kernels_for(problem.device))


def why_no_kernel(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel serves ``op`` for modules on ``device``; None where one does. A module on the
    meta device will be on another one when it is called: it is judged as on a CPU."""
    problem = Problem(op, "cpu" if device.type == "meta" else device.type, dtype)
    if serves(problem):
        return None
    against = (f"{name}: {', '.join(unsupported_by_default(problem, name))}" for name in KERNELS)
    return f"no kernel serves {dtype} on {device.type} ({'; '.join(against)})"


def _kernels_for(device: str) -> tuple[str, ...]:
    """The backends with kernels that a call on ``device`` may go to by itself, the first first."""
    return ("cpu",) if device == "cpu" else ("cuda", "triton")


def select(problem: Problem, backend: str | None = None, *, run_self_check: bool = True) -> str:
    """The backend for ``problem``: ``backend``, or ``FASTATTN_BACKEND``, or the first without a
    reason against it. Without ``run_self_check`` nothing is computed.

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
        against = unsupported(problem, explicit)
        if against:
            named_by = "" if backend is not None else " (FASTATTN_BACKEND)"
            raise RuntimeError(
                f"backend {explicit!r}{named_by} cannot serve {problem.op}: {'; '.join(against)}"
            )
        _failures(problem, explicit, run_self_check)  # warns
        return explicit
    against = []
    for name in _kernels_for(problem.device):
        against = (
            unsupported(problem, name)
            or _unproven(problem, name)
            or _failures(problem, name, run_self_check)
        )
        if not against:
            if name == "cpu" and not compiling:
                _served_by_cpu.add(problem)  # nothing about it can change
            return name
    if not compiling:
        if problem.device == "cuda" and not unsupported(problem, "cuda"):
            against = [*against, *(f"cuda: {reason}" for reason in _unproven(problem, "cuda"))]
        warn_once(
            f"{problem.op} runs on the reference backend, without kernels: {'; '.join(against)}", 4
        )
    return "reference"


def kernels_of(backend: str) -> str:
    """Which ops a chosen backend calls: "triton", or "native", whose ops run the C++ kernels on CPU
    tensors and the CUDA kernels on CUDA tensors."""
    return "triton" if backend == "triton" else ops.NATIVE


def has_served_on_cpu(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the CPU kernels took a call of a layer in the dtype before; nothing about it can
    change."""
    return device.type == "cpu" and (op, dtype) in _layers_on_cpu and _default is None


def select_layers(
    op: str, input: Tensor, weights: Sequence[Tensor], backend: str | None = None
) -> str:
    """``select`` for a call of ``linear_relu`` or ``mlp``. On a CPU the op and the dtype decide, so
    that a look-up in a set answers: a small layer takes only some microseconds in all."""
    if torch.compiler.is_compiling() or backend is not None or not input.is_cpu:
        return select(linear_problem(op, input, weights), backend)
    if has_served_on_cpu(op, input.device, input.dtype):
        return "cpu"
    chosen = select(linear_problem(op, input, weights))
    if chosen == "cpu":
        _layers_on_cpu.add((op, input.dtype))
    return chosen


def named(backend: str | None) -> bool:
    """Whether the call or the environment names a backend."""
    return backend is not None or _default is not None


def torch_multiplies(input: Tensor, backend: str | None) -> bool:
    """Whether a call that names no backend leaves its products on a CPU to torch, which is faster
    by more than the kernels' epilogues save."""
    return not named(backend) and _products.torch_multiplies(input)


def select_activation(
    input: Tensor, backend: str | None = None, op: str = "activation_dropout"
) -> str:
    """``select`` for an activation with dropout, and for linear layers with one: ``cpu``,
    ``triton``, or ``reference`` for torch's own operations. Where no kernel serves the call, these
    are taken without a warning, because they need no more memory than a kernel."""
    plain = backend is None and _default is None and not torch.compiler.is_compiling()
    if plain and input.is_cpu and (op, input.dtype) in _layers_on_cpu:
        return "cpu"
    problem = rows_problem(op, input)
    if named(backend):
        return select(problem, backend)
    chosen = select(problem) if serves(problem) else "reference"
    if plain and chosen == "cpu":
        _layers_on_cpu.add((op, input.dtype))
    return chosen


def warn_once(message: str, stacklevel: int) -> None:
    """Warns once for each message, at the line of the user's code that made the call."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, FastAttnWarning, stacklevel=stacklevel)


def available() -> list[str]:
    """The backends that can serve anything on this machine."""
    return [name for name in BACKENDS if unavailable(name) is None]


def unavailable(backend: str) -> str | None:
    """Why a backend serves nothing on this machine; None where it serves something."""
    if backend == "reference":
        return None
    on_gpu = backend == "cuda" or (backend == "triton" and not triton.interpreting())
    if on_gpu and not torch.cuda.is_available():
        return "torch sees no GPU"
    device = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
    against = unsupported(Problem("attention", device, torch.float16, 64), backend)
    return "; ".join(against) or None


def explain(op: str, *args: Any, backend: str | None = None, **options: Any) -> Explanation:
    """The Explanation of a call: which backend serves it, and why not the others.

    Nothing is computed. The backend of ``linear``, ``linear_relu`` and ``mlp`` is ``torch`` where
    torch's product is taken.

    Args:
        op: ``attention``, ``varlen_attn``, ``linear``, ``linear_relu``, ``mlp``,
            ``activation_dropout`` or ``dropout_add_norm``.
        args: what the call has by position. ``linear`` (input, weight) is the product of
            ``fastattn.nn.Linear``, under the autocast that is on.
        backend: as in the call.
        options: what the call has by keyword.

    Raises:
        ValueError, TypeError: an unknown op or backend; tensors that are missing.
        RuntimeError: ``backend`` names one that cannot serve the call.

    >>> query = torch.randn(2, 8, 16, 64)
    >>> explain("attention", query, query, query, softcap=5.0).backend in available()
    True
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not tensors:
        raise TypeError("args: expected the op's tensors, got none")
    if op == "linear":
        return _explain_linear(*tensors[:2])
    if op in ("attention", "varlen_attn"):
        if len(tensors) < 3:
            raise TypeError(f"args: expected query, key, value, got {len(tensors)} tensors")
        names = ("attn_mask", "dropout_p", "is_causal", "scale") if op == "attention" else ()
        call = dict(zip(names, args[3:], strict=False)) | options
        query, key, value = tensors[:3]
        problem = attention_problem(op, query, key, value, **call)
    elif op in ("activation_dropout", "dropout_add_norm"):
        problem = rows_problem(op, tensors[0])
    else:
        weights = tensors[1:2] if op == "linear_relu" else next(iter(args[1:]), ())
        problem = linear_problem(op, tensors[0], weights)
    why = unsupported if backend is not None else unsupported_by_default
    against = {name: why(problem, name) for name in BACKENDS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastAttnWarning)
        chosen = select(problem, backend, run_self_check=False)
    detail = ""
    of_product = chosen == "cpu" and op in ("linear_relu", "mlp")
    if of_product and torch_multiplies(tensors[0], backend):
        chosen = "torch"
        against["cpu"] = [_products.why_always_torchs(tensors[0].dtype)]
    if chosen == "cuda" and op == "mlp":
        detail = "one kernel for all layers" if fused_mlp(weights) else "a layer at a time"
    if chosen == "triton" and op in ("linear_relu", "mlp") and len(tensors) > 1:
        input, weight = tensors[:2]
        rows = input.numel() // max(1, input.shape[-1])
        n_out, n_in = weight.shape
        fused = config.fused_product(rows, n_out, n_in, input.element_size())
        detail = "one fused kernel" if fused else "cuBLAS and a kernel for the ReLU and its bits"
    return Explanation(op, chosen, against, detail)


def _explain_linear(input: Tensor, weight: Tensor | None = None) -> Explanation:
    """What ``fastattn.nn.Linear`` does with an ordinary call."""
    if weight is None or weight.dim() != 2 or input.dim() < 1:
        raise TypeError("args: expected input [..., in_features], weight [out_features, ...]")
    dtype = computed_dtype(input)
    problem = linear_problem("linear", input, (weight,))._replace(dtype=dtype)
    against = {name: unsupported_by_default(problem, name) for name in BACKENDS}
    rows = input.numel() // max(1, input.shape[-1])
    n_out, n_in = weight.shape
    slower = _products.why_torchs(rows, n_out, n_in, dtype, input.device)
    if slower is None and not against["cpu"]:
        return Explanation("linear", "cpu", against, _products.why_kernels(dtype))
    for name in KERNELS:
        against[name] = against[name] or [slower or ""]
    return Explanation("linear", "torch", against, slower or "no kernel serves it")
