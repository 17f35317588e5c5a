"""The families of kernels, and whether one of them is right: it solves small problems, each twice,
and is compared with the float64 reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fastattn.ops.triton.config import tf32_allowed
from fastattn.verification.layer_problems import (
    solve_activation,
    solve_linear,
    solve_linear_layers,
    solve_mlp,
    solve_norm,
)
from fastattn.verification.problems import (
    Case,
    Comparison,
    Device,
    KernelFault,
    solve_attention,
)
from fastattn.verification.training_problem import solve_training_step


@dataclass(frozen=True)
class Family:
    """Kernels that are right or wrong together."""

    solve: Callable[[Device, Case], Iterator[Comparison]]  # every problem of doctor --check
    first: Callable[[Device, Case], Iterator[Comparison]]  # the one of the first use
    backends: tuple[str, ...] = ("cpu", "cuda", "triton")


def _attention(parts: str, *variants: str, **options) -> Family:
    return Family(
        functools.partial(solve_attention, parts, variants),
        functools.partial(solve_attention, parts, variants[:1]),
        **options,
    )


def _linear(solve: Callable[[Device, Case], Iterator[Comparison]], **options) -> Family:
    return Family(solve, solve, **options)


def _activation(*calls: tuple[str | None, float], **options) -> Family:
    return Family(
        functools.partial(solve_activation, calls),
        functools.partial(solve_activation, calls[:1]),
        **options,
    )


_NOT_CUDA = ("cpu", "triton")
FAMILIES: dict[str, Family] = {
    "attention_forward": _attention("forward", "", "padding and window"),
    "attention_backward": _attention("backward", "", "padding and window"),
    "attention_options": _attention(
        "forward backward", "dropout, softcap, ALiBi", backends=_NOT_CUDA
    ),
    "mask_gradient": _attention("backward", "bias", backends=_NOT_CUDA),
    "varlen_attn": _attention("forward backward", "packed", backends=_NOT_CUDA),
    "attention_jvp": _attention("tangent", "", "bias", backends=_NOT_CUDA),
    "attention_double_backward": _attention("second", "", "bias", backends=_NOT_CUDA),
    "linear_relu": _linear(functools.partial(solve_linear, "gradients")),
    "linear_relu_jvp": _linear(functools.partial(solve_linear, "tangent"), backends=_NOT_CUDA),
    "mlp": _linear(solve_mlp, backends=("cpu", "cuda")),
    "linear_layers": _linear(solve_linear_layers, backends=("cpu",)),
    "activation_dropout": _activation(
        ("gelu", 0.25),
        ("gelu_tanh", 0.0),
        ("silu", 0.0),
        ("relu", 0.25),
        ("relu2", 0.0),
        ("quick_gelu", 0.0),
        (None, 0.25),
        backends=_NOT_CUDA,
    ),
    "dropout_add_norm": _linear(solve_norm, backends=_NOT_CUDA),
    "training_step": _linear(solve_training_step, backends=("cpu",)),
}


def families_of(backend: str) -> tuple[str, ...]:
    """The families that a backend has kernels for."""
    return tuple(name for name, family in FAMILIES.items() if backend in family.backends)


def at_first_use(backend: str) -> tuple[str, ...]:
    """Those that are checked when a GPU first runs them. The others are left to ``doctor --check``:
    the same kernels with more options, and the kernels of second derivatives."""
    first = ("attention_forward", "attention_backward", "varlen_attn", "linear_relu", "mlp",
             "activation_dropout", "dropout_add_norm")  # fmt: skip
    return tuple(name for name in families_of(backend) if name in first)


def cases(backend: str, device: torch.device) -> tuple[Case, ...]:
    """What ``fastattn doctor --check`` solves: every dtype, a head dim of 64, of 128 and one that
    no tile has, causal and not. Triton compiles its kernels anew for each."""
    if backend == "triton" and device.type == "cpu":  # the interpreter takes seconds for each
        return (Case(torch.float16, 16, True, rows=18, heads=2),)
    found = (
        Case(torch.bfloat16, 64, True),
        Case(torch.bfloat16, 128, False),
        Case(torch.float16, 128, True),
        Case(torch.float16, 72, False),
        Case(torch.float32, 64, False),
        Case(torch.float32, 40, True),
        Case(torch.float64, 40, False),
    )
    if backend == "cuda":
        return tuple(c for c in found if c.dtype in (torch.bfloat16, torch.float16))
    return tuple(c._replace(rows=40) for c in found) if device.type == "cpu" else found


@dataclass(frozen=True)
class Outcome:
    """The result of a family that was off most, in units of what is allowed, or why it failed."""

    error: float = 0.0  # the largest error of a result over its largest element
    limit: float = 1.0
    where: str = ""  # which result of which case
    exception: str = ""  # the first line of the kernel's, if there was one
    lasting: bool = True  # False: another setting of the machine or of torch may change it

    @property
    def good(self) -> bool:
        return not self.exception and self.error <= self.limit

    def __str__(self) -> str:
        if self.exception:
            return self.exception
        return f"{self.where}: relative error {self.error:.1e}, at most {self.limit:.1e} is allowed"


def _limit(comparison: Comparison, case: Case) -> float:
    """The sums' roundings (256, where errors of up to 30 are seen) and the result's and the
    operands' own (8, where errors of up to 2 are)."""
    actual = comparison.actual
    if not actual.is_floating_point():
        return 0.0
    roundoff = torch.finfo(actual.dtype).eps / 2
    if case.dtype == torch.float32 and tf32_allowed():
        roundoff = 2.0**-11  # the products may be TF32's
    return 8 * roundoff + 256 * (2.0**-53 if case.dtype == torch.float64 else 2.0**-24)


def _error(comparison: Comparison) -> float:
    """The largest error over the largest element; infinite for a NaN, an infinity at the wrong
    place and a wrong shape."""
    actual, expected = comparison.actual.double(), comparison.expected.double()
    if actual.shape != expected.shape:
        return math.inf
    off = torch.where(actual == expected, 0.0, (actual - expected).abs().nan_to_num(math.inf))
    size = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    return off.max().item() / (size or 1.0)


def check(family: str, at: Device, cases: Sequence[Case], *, first_use: bool = False) -> Outcome:
    """Solves ``family``'s problems on all ``cases``, or, on the first use, one for each case.

    Whatever a kernel raises is an Outcome; only torch.OutOfMemoryError is raised, as it says
    nothing about the kernel.
    """
    solve = FAMILIES[family].first if first_use else FAMILIES[family].solve
    worst = Outcome()
    try:
        with torch.no_grad():
            for case in cases:
                for comparison in solve(at, case):
                    error, limit = _error(comparison), _limit(comparison, case)
                    if error * worst.limit > worst.error * limit:
                        worst = Outcome(error, limit, f"{comparison.name}, {_described(case)}")
                    if error > limit:
                        return worst
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel that is broken raises anything
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        of_gpu = any(words in str(error) for words in ("CUDA error", "Triton Error [CUDA]"))
        lasting = isinstance(error, KernelFault) or of_gpu
        return Outcome(exception=_first_line(error), lasting=lasting)
    return worst


def _first_line(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _described(case: Case) -> str:
    dtype = str(case.dtype).removeprefix("torch.")
    return f"{dtype}, head dim {case.head_dim}{', causal' * case.is_causal}"
