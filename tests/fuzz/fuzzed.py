"""Random problems for every public operation: shapes, layouts, dtypes, options, magnitudes, special
values and orders of derivatives, each from a seed and a number alone. Here those of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import fuzzed_layers
import fuzzed_rows
import torch
from drawn import MAGNITUDES, MASKS, VALUES, Draw, Problem, shared
from terms import terms_of_attention
from torch import Tensor

import fastattn


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
    dtype, magnitude, order, threads = shared(made)
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
    problem.terms = terms_of_attention
    return problem


def _packed_attention(made: Draw) -> Problem:
    dtype, magnitude, order, threads = shared(made)
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


OPS: dict[object, Callable[[Draw], Problem]] = {
    "attention": _attention,
    "packed attention": _packed_attention,
    "linear_relu": fuzzed_layers.linear_relu,
    "mlp": fuzzed_layers.mlp,
    "layers": fuzzed_layers.layers,
    "gated": fuzzed_layers.gated,
    "activation": fuzzed_rows.activation,
    "norm": fuzzed_rows.norm,
}
_WEIGHTS = (6, 1, 2, 2, 2, 1, 1, 2)


def draw(seed: int, number: int) -> Problem:
    made = Draw(seed, number)
    problem = OPS[made.one("op", OPS, _WEIGHTS)](made)
    problem.classes = made.classes
    return problem


def op_of(seed: int, number: int) -> object:
    """The op of a problem, which is its first choice; the rest is not drawn."""
    return Draw(seed, number).one("op", OPS, _WEIGHTS)
