"""Random problems for every public operation: shapes, layouts, dtypes, options, magnitudes, special
values and orders of derivatives, each from a seed and a number alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastattn

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "rows first", "in wider rows", "every other row", "expanded")
# Of queries, keys and inputs. A score is a product of two of them.
MAGNITUDES = {"1": 1.0, "30": 5.5, "300": 17.0, "4000": 63.0, "tiny": 1e-5, "subnormal": 1e-39}
MASKS = ("none", "bool", "float", "learned", "finite lowest", "infinite")
VALUES = {"1": 1.0, "large": 1e4, "small": 1e-4, "0": 0.0}


@dataclass
class Problem:
    """``run`` gives results for the leaves in any dtype: those of the kernels, of the reference in
    the same dtype, and of the reference in float64 are compared."""

    op: str
    run: Callable[[Sequence[Tensor], str], Sequence[Tensor]]
    leaves: list[Tensor]
    order: int
    magnitude: str
    threads: int
    score: float = 0.0  # a bound of |score|
    scale: float = 1.0  # of scores
    dropped: float = 1.0  # 1 / (1 - dropout_p)
    layers: int = 0
    classes: list[str] = field(default_factory=list)
    whole: bool = True  # False: results may be NaN or infinite, and only where is compared


class Draw:
    """Choices by a name, which are counted by their classes."""

    def __init__(self, seed: int, number: int) -> None:
        self.rng = random.Random(f"{seed}/{number}")
        self.classes: list[str] = []
        self.tensors = torch.Generator().manual_seed(self.rng.randrange(2**62))

    def one(self, what: str, choices: Sequence, weights: Sequence[float] | None = None) -> object:
        chosen = self.rng.choices(list(choices), weights)[0]
        self.classes.append(f"{what}: {str(chosen).removeprefix('torch.')}")
        return chosen

    def size(self, what: str, largest: int) -> int:
        """Often small, at times 0 or 1, rarely the largest."""
        kind = self.rng.random()
        n = 0 if kind < 0.01 else 1 if kind < 0.12 else self.rng.randint(2, largest)
        if n > 40 and self.rng.random() < 0.85:
            n = self.rng.randint(2, 40)
        if n == 0:
            self.classes.append(f"no {what}")
        return n

    def normal(self, *shape: int, dtype: torch.dtype, by: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.tensors, dtype=torch.float64) * by
        return x.clamp(-3e38, 3e38).to(dtype)

    def laid_out(self, x: Tensor) -> Tensor:
        """The same values in another order of memory."""
        layout = self.one("layout", LAYOUTS, (6, 2, 1, 1, 1))
        if layout == "rows first" and x.dim() > 2:
            return x.transpose(-3, -2).contiguous().transpose(-3, -2)
        if layout == "in wider rows":
            wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
            wide[..., 1 : 1 + x.shape[-1]] = x
            return wide[..., 1 : 1 + x.shape[-1]]
        if layout == "every other row" and x.dim() > 1:
            wide = x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), math.nan)
            wide[..., ::2, :] = x
            return wide[..., ::2, :]
        if layout == "expanded" and x.dim() > 2:
            return x[..., :1, :].expand(x.shape) if x.shape[-2] else x
        return x


def draw(seed: int, number: int) -> Problem:
    made = Draw(seed, number)
    kind = made.one("op", OPS, (6, 1, 2, 2))
    problem = OPS[kind](made)
    problem.classes = made.classes
    return problem


def _shared(made: Draw) -> tuple[torch.dtype, str, int, int]:
    dtype = made.one("dtype", DTYPES)
    magnitude = made.one("magnitude", MAGNITUDES, (6, 1, 1, 1, 1, 1))
    if dtype.itemsize == 2 and magnitude == "subnormal":
        magnitude = "tiny"  # float16 has no such numbers; vdpbf16ps takes those of bfloat16 as 0
    order = made.one("order", (0, 1, 2), (3, 3, 2))
    return dtype, magnitude, order, made.one("threads", (1, 2), (3, 1))


def _options(made: Draw, length: int, heads: int, batch: int | None) -> dict[str, object]:
    options: dict[str, object] = {}
    if made.rng.random() < 0.3:
        options["is_causal"] = True
    if made.rng.random() < 0.15:
        options["window_size"] = tuple(made.rng.choice((-1, 0, 3, length, 2**61)) for _ in "lr")
    if made.rng.random() < 0.12:
        options["softcap"] = made.rng.choice((0.5, 20.0))
    if made.rng.random() < 0.12:
        shape = (heads,) if batch is None or made.rng.random() < 0.5 else (batch, heads)
        options["alibi_slopes"] = torch.rand(shape, generator=made.tensors)
    if made.rng.random() < 0.15:
        options["dropout_p"] = made.rng.choice((0.1, 0.5, 0.97, 1.0))
    if made.rng.random() < 0.2:
        options["scale"] = made.rng.choice((0.3, -0.2, 0.0))
    made.classes += [f"option: {name}" for name in options]
    return options


def _mask(
    made: Draw, batch: int, heads: int, rows: int, keys: int, dtype: torch.dtype
) -> Tensor | None:
    kind = made.one("mask", MASKS, (4, 2, 1, 1, 1, 1))
    if kind == "none":
        return None
    full = (batch, heads, rows, keys)
    shape = tuple(n if made.rng.random() < 0.6 else 1 for n in full)[made.rng.randint(0, 2) :]
    if kind in ("float", "learned"):
        return made.normal(*shape, dtype=dtype).requires_grad_(kind == "learned")
    seen = torch.rand(shape, generator=made.tensors) > made.rng.choice((0.1, 0.5, 0.9))
    if kind == "bool":
        return seen
    lowest = torch.finfo(dtype).min if kind == "finite lowest" else -math.inf
    return torch.zeros(shape, dtype=dtype).masked_fill_(~seen, lowest)


def _attention(made: Draw) -> Problem:
    dtype, magnitude, order, threads = _shared(made)
    batch, heads_k = made.size("batch", 3), made.size("heads", 3)
    heads = heads_k * made.one("queries' heads for one of keys", (1, 2, 3), (4, 1, 1))
    rows, keys = made.size("queries", 300), made.size("keys", 300)
    dim, dim_v = made.size("head_dim", 80), made.size("head_dim of values", 80)
    by, value = MAGNITUDES[magnitude], VALUES[made.one("values", VALUES, (6, 1, 1, 1))]
    q = made.laid_out(made.normal(batch, heads, rows, dim, dtype=dtype, by=by))
    k = made.laid_out(made.normal(batch, heads_k, keys, dim, dtype=dtype, by=by))
    v = made.laid_out(made.normal(batch, heads_k, keys, dim_v, dtype=dtype, by=value))
    options = _options(made, max(rows, keys), heads, batch)
    mask = _mask(made, batch, heads, rows, keys, dtype)
    whole = order > 0 or not _special_values(made, q, k, v)
    learned = mask is not None and mask.requires_grad
    leaves = [q, k, v, *([mask.detach()] if learned else [])]

    def run(leaves: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
        bias = leaves[3] if learned else mask
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.to(leaves[0].dtype)
        return fastattn.scaled_dot_product_attention(
            *leaves[:3], bias, enable_gqa=True, return_lse=True, backend=backend, **options
        )

    problem = Problem("attention", run, leaves, order, magnitude, threads, whole=whole)
    return _with_sizes(problem, options, mask)


def _special_values(made: Draw, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """NaN in some row of q, k or v, whether it is hidden or not."""
    if made.rng.random() > 0.1:
        return False
    x = made.one("a NaN in", (0, 1, 2))
    x = (q, k, v)[x]
    if not x.numel() or 0 in x.stride():
        return False
    row = tuple(made.rng.randrange(n) for n in x.shape[:-1])
    x[row] = math.nan
    return True


def _with_sizes(problem: Problem, options: dict[str, object], mask: Tensor | None) -> Problem:
    """The problem with a bound of its scores."""
    q, k = problem.leaves[:2]
    largest = [
        float(x.double().nan_to_num().norm(dim=-1).max()) if x.numel() else 0.0 for x in (q, k)
    ]
    problem.scale = abs(float(options.get("scale", max(1, q.shape[-1]) ** -0.5)))
    problem.score = problem.scale * largest[0] * largest[1]
    if "alibi_slopes" in options:
        problem.score += 300  # tokens apart
    if mask is not None and mask.dtype != torch.bool:
        shown = mask.detach()[mask > torch.finfo(mask.dtype).min].double()
        problem.score += float(shown.abs().max()) if shown.numel() else 0.0
    kept = 1.0 - float(options.get("dropout_p", 0.0))
    problem.dropped = 1.0 / kept if kept else 1.0
    return problem


def _packed_attention(made: Draw) -> Problem:
    dtype, magnitude, order, threads = _shared(made)
    heads_k = made.size("heads", 3)
    heads = heads_k * made.one("queries' heads for one of keys", (1, 2), (3, 1))
    dim, dim_v = made.size("head_dim", 70), made.size("head_dim of values", 70)
    sets = made.size("sequences", 5)
    lengths = [(made.size("queries", 60), made.size("keys", 60)) for _ in range(sets)]
    rows, keys = (sum(n[i] for n in lengths) for i in (0, 1))
    by = MAGNITUDES[magnitude]
    q = made.laid_out(made.normal(rows, heads, dim, dtype=dtype, by=by))
    k = made.laid_out(made.normal(keys, heads_k, dim, dtype=dtype, by=by))
    v = made.laid_out(made.normal(keys, heads_k, dim_v, dtype=dtype))
    starts = [torch.tensor([0, *(n[i] for n in lengths)]).cumsum(0).to(torch.int32) for i in (0, 1)]
    most = [max((n[i] for n in lengths), default=0) for i in (0, 1)]
    options = _options(made, 60, heads, sets)

    def run(leaves: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
        return fastattn.varlen_attn(
            *leaves, *starts, *most, return_lse=True, backend=backend, **options
        )

    problem = Problem("packed attention", run, [q, k, v], order, magnitude, threads)
    return _with_sizes(problem, options, None)


def _layers(made: Draw, rows: int, widths: list[int], biased: list[bool]) -> Problem:
    """Leaves x, weights, biases. Where derivatives are wanted, no sum is near 0, where rounding
    would decide on which side of the ReLU it is: inputs are positive, a unit's weights and bias
    have one sign."""
    dtype, magnitude, order, threads = _shared(made)
    if order and magnitude == "subnormal":
        magnitude = "tiny"
    x = made.normal(rows, widths[0], dtype=dtype, by=MAGNITUDES[magnitude])
    weights, biases = [], []
    for n_in, n_out, bias in zip(widths, widths[1:], biased, strict=False):
        w, b = (made.normal(*n, dtype=dtype) for n in ((n_out, n_in), (n_out,)))
        w = w / max(1, n_in) ** 0.5
        if order:
            signs = 1 - 2 * torch.randint(2, (n_out,), generator=made.tensors)
            w, b = w.abs() * signs[:, None], b.abs() * signs
        weights.append(made.laid_out(w.to(dtype)))
        biases += [b.to(dtype)] if bias else []
    x = made.laid_out(x.abs() if order else x)
    problem = Problem(
        "", lambda leaves, backend: [], [x, *weights, *biases], order, magnitude, threads
    )
    problem.layers = len(weights)
    return problem


def _linear_relu(made: Draw) -> Problem:
    widths = [made.size("inputs", 300), made.size("outputs", 300)]
    biased = made.one("bias", (True, False))
    problem = _layers(made, made.size("rows", 300), widths, [biased])
    problem.op = "linear_relu"
    problem.run = lambda leaves, backend: [fastattn.linear_relu(*leaves, backend=backend)]
    return problem


def _mlp(made: Draw) -> Problem:
    layers = made.one("layers", (1, 2, 3))
    widths = [made.size("outputs", 150) for _ in range(layers + 1)]
    biased = [made.rng.random() < 0.7 for _ in range(layers)]
    problem = _layers(made, made.size("rows", 200), widths, biased)

    def run(leaves: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
        rest = iter(leaves[1 + layers :])
        shifts = [next(rest) if b else None for b in biased]
        return [fastattn.mlp(leaves[0], list(leaves[1 : 1 + layers]), shifts, backend=backend)]

    problem.op, problem.run = "mlp", run
    return problem


OPS: dict[object, Callable[[Draw], Problem]] = {
    "attention": _attention,
    "packed attention": _packed_attention,
    "linear_relu": _linear_relu,
    "mlp": _mlp,
}
