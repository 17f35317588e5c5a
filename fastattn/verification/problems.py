"""Small problems of attention, solved by the kernels and by the float64 reference, and what the
problems of every family of kernels have in common.

The kernels are called as ops: no autograd, no random numbers of torch's, no state of the caller's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import ops, reference

GPU_SECONDS = 10.0  # what one small problem may take; compilation is not part of it


class KernelFault(RuntimeError):
    """A kernel that does not come to the same result twice."""


class NotFinished(RuntimeError):
    """The GPU was busy for too long, by a kernel that hangs or by another program's."""


class Case(NamedTuple):
    """One of the problems that a family is checked on."""

    dtype: torch.dtype
    head_dim: int
    is_causal: bool
    rows: int = 150  # queries of a head, rows of a linear layer
    heads: int = 4  # an even number


class Comparison(NamedTuple):
    """A kernel's result beside the reference's, both on the CPU."""

    name: str
    actual: Tensor
    expected: Tensor  # float64


class Device(NamedTuple):
    """Whose kernels solve a problem, and where."""

    backend: str
    device: torch.device

    def run(self, kernels: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``kernels`` computes, on the CPU.

        Raises KernelFault where a second call gives other bits, NotFinished where the GPU does not
        finish.
        """
        found, again = kernels(), kernels()
        _wait(self.device)
        for name, x in found.items():
            if not torch.equal(_bytes(x), _bytes(again[name])):
                raise KernelFault(f"{name}: two calls with the same inputs differ")
        return {name: x.detach().cpu() for name, x in found.items()}


def _bytes(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().view(torch.uint8)


def _wait(device: torch.device) -> None:
    """Waits for the current stream; a kernel that hangs must not hang its caller as well."""
    if device.type != "cuda":
        return
    done = torch.cuda.Event()
    done.record()
    deadline = time.monotonic() + GPU_SECONDS
    while not done.query():
        if time.monotonic() > deadline:
            raise NotFinished(f"the GPU did not finish within {GPU_SECONDS:g} s")
        time.sleep(1e-4)


class Random:
    """Numbers that are the same everywhere and leave torch's generators as they are."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator("cpu").manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return x.to(dtype or self.dtype)

    def heads(self, batch: int, heads: int, rows: int, head_dim: int) -> Tensor:
        """``[batch, heads, rows, head_dim]`` as a projection leaves it: heads side by side."""
        return self(batch, rows, heads, head_dim).transpose(1, 2)

    def mask(self, *shape: int) -> Tensor:
        """bool, about seven of ten True."""
        return self(*shape, dtype=torch.float32) > -0.5


@dataclass(frozen=True)
class _Attention:
    """The arguments of one attention call and of its derivatives."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    tangents: ops.Tangents
    is_causal: bool
    mask: Tensor | None = None
    starts: Tensor | None = None  # of the packed sequences, queries and keys alike
    longest: int = 0
    window: tuple[int, int] = (-1, -1)
    dropout_p: float = 0.0
    softcap: float = 0.0
    seed: Tensor | None = None
    slopes: Tensor | None = None

    def to(self, where: torch.device | torch.dtype) -> _Attention:
        """The same elsewhere, or with numbers in another dtype."""

        def move(x: Tensor | None) -> Tensor | None:
            if x is None or (isinstance(where, torch.dtype) and not x.is_floating_point()):
                return x
            return x.to(where)

        moved: dict[str, Any] = {
            name: move(x) for name, x in vars(self).items() if isinstance(x, Tensor)
        }
        return replace(self, **moved, tangents=ops.Tangents(*map(move, self.tangents)))

    def by_kernels(self, at: Device, parts: frozenset[str]) -> dict[str, Tensor]:
        x = self.to(at.device)
        return at.run(lambda: x._found(at.backend, parts))

    def _found(self, backend: str, parts: frozenset[str]) -> dict[str, Tensor]:
        x = self
        scale = x.query.shape[-1] ** -0.5
        options = ops.Options(
            x.is_causal, scale, x.dropout_p, *x.window, x.softcap, x.longest, x.longest
        )
        inputs = ops.Inputs(x.query, x.key, x.value, x.mask)
        extras = ops.Extras(x.slopes, x.seed, x.starts, x.starts)
        cotangents, tangents = ops.Cotangents(x.grad_out, x.grad_lse), x.tangents
        out, lse, *softmax = ops.attention_forward(inputs, extras, options, backend)
        results = ops.Results(out, *softmax)
        found = {"out": out, "lse": lse} if "forward" in parts else {}
        needs = [True, True, True, x.mask is not None and x.mask.dtype != torch.bool]
        names = ("dq", "dk", "dv", *["dmask"] * needs[3])
        if "backward" in parts:
            grads = ops.attention_backward(
                cotangents, inputs, extras, results, options, needs, backend
            )
            found |= zip(names, grads, strict=False)
        if "tangent" in parts:
            moved = ops.attention_jvp(inputs, extras, tangents, results, options, backend)
            found |= zip(("t_out", "t_lse"), moved, strict=True)
        if "second" in parts:
            t_out, t_lse, *second = ops.attention_double_backward(
                cotangents, inputs, extras, tangents, results, options, [True, *needs], backend
            )
            found |= {"t_out": t_out, "t_lse": t_lse}
            found |= zip([f"second {name}" for name in names], second, strict=False)
        return found

    def by_reference(self, parts: frozenset[str]) -> dict[str, Tensor]:
        if self.starts is None:
            return self.to(torch.float64)._expected(parts)
        whole: dict[str, list[Tensor]] = {}
        for start, end in itertools.pairwise(self.starts.tolist()):
            for name, x in self._rows(start, end).to(torch.float64)._expected(parts).items():
                whole.setdefault(name, []).append(x)
        return {name: torch.cat(xs, 2) for name, xs in whole.items()}

    def _rows(self, start: int, end: int) -> _Attention:
        """One of the packed sequences."""
        names = ("query", "key", "value", "grad_out", "grad_lse")
        sliced: dict[str, Any] = {name: getattr(self, name)[:, :, start:end] for name in names}
        return replace(self, **sliced, starts=None)

    def _expected(self, parts: frozenset[str]) -> dict[str, Tensor]:
        inputs = (self.query, self.key, self.value, self.mask)
        options: dict[str, Any] = {
            "seed": self.seed,
            "is_causal": self.is_causal,
            "dropout_p": self.dropout_p,
            "window_size": self.window,
            "softcap": self.softcap,
            "alibi_slopes": self.slopes,
        }
        out, lse = reference.attention_forward(*inputs, **options)
        found: dict[str, Tensor | None] = {"out": out, "lse": lse} if "forward" in parts else {}
        names = ("dq", "dk", "dv", "dmask")
        of_results = (self.grad_out, self.grad_lse, *inputs)
        if "backward" in parts:
            grads = reference.attention_backward(*of_results, out, lse, **options)
            found |= zip(names, grads, strict=True)
        if parts & {"tangent", "second"}:
            tangents = reference.attention_jvp(*inputs, self.tangents, **options)
            found |= zip(("t_out", "t_lse"), tangents, strict=True)
        if "second" in parts:
            grads = reference.attention_double_backward(*of_results, self.tangents, **options)
            found |= zip([f"second {name}" for name in names], grads, strict=True)
        return {name: x for name, x in found.items() if x is not None}


def _attention(case: Case, variant: str) -> _Attention:
    """Two batch elements, two query heads for each key head, a ragged number of queries and of
    keys. ``variant`` names what the call has beside."""
    random, rows, dim = Random(case.dtype), case.rows, case.head_dim
    batch, heads, keys = 2, case.heads, rows + 37
    lse = torch.float64 if case.dtype == torch.float64 else torch.float32
    packed = variant == "packed"
    if packed:
        batch, keys = 1, rows
    shapes = [(heads, rows, dim), (heads // 2, keys, dim), (heads // 2, keys, dim)]
    query, key, value = (random.heads(batch, *shape) for shape in shapes)
    grad_out, grad_lse = random(batch, heads, rows, dim), random(batch, heads, rows, dtype=lse)
    t_query, t_key, t_value = (random.heads(batch, *shape) for shape in shapes)
    tangents = ops.Tangents(t_query, t_key, t_value)
    call = _Attention(query, key, value, grad_out, grad_lse, tangents, case.is_causal)
    if packed:  # one of the sequences is empty
        starts = torch.tensor([0, rows // 3, rows // 3, rows], dtype=torch.int32, device="cpu")
        return replace(call, starts=starts, longest=rows - rows // 3)
    if variant == "padding and window":
        lengths = torch.tensor([keys, keys // 2], device="cpu")
        padding = torch.arange(keys, device="cpu") < lengths[:, None]
        return replace(call, mask=padding[:, None, None], window=(rows // 3, rows // 4))
    if variant == "bias":
        bias = (random(1, heads, rows, keys), random(1, heads, rows, keys))
        return replace(call, mask=bias[0], tangents=tangents._replace(attn_mask=bias[1]))
    if variant == "dropout, softcap, ALiBi":
        seed = torch.tensor([1234567890123], dtype=torch.int64, device="cpu")
        slopes = 2.0 ** -torch.arange(1, heads + 1, device="cpu", dtype=lse)
        mask = random.mask(batch, 1, rows, keys)
        extras: dict[str, Any] = {"dropout_p": 0.25, "softcap": 3.0, "seed": seed, "slopes": slopes}
        return replace(call, mask=mask, **extras)
    return call


def solve_attention(
    parts: str, variants: tuple[str, ...], at: Device, case: Case
) -> Iterator[Comparison]:
    """``parts``: those of "forward backward tangent second" that are computed."""
    wanted = frozenset(parts.split())
    for variant in variants:
        call = _attention(case, variant)
        expected = call.by_reference(wanted)
        for name, actual in call.by_kernels(at, wanted).items():
            yield Comparison(f"{name} ({variant})" if variant else name, actual, expected[name])
