"""What a kernel meets first on a GPU: problems from one tile upwards, and what its error says.

Free of torch: a stand-in for the GPU is judged by the same rules.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class AttentionSize(NamedTuple):
    batch: int
    heads_q: int
    heads_k: int
    seq_q: int
    seq_k: int
    causal: bool = False


class LinearSize(NamedTuple):
    rows: int
    n_in: int
    n_out: int


class MlpSize(NamedTuple):
    rows: int
    n_in: int
    hidden: int
    n_out: int


class Case(NamedTuple):
    name: str
    size: AttentionSize | LinearSize | MlpSize
    dtype: str = "bfloat16"


class Kernel(NamedTuple):
    """A kernel of the CUDA library, and how it is reached."""

    op: str  # attention, linear, mlp
    backward: bool = False
    head_dim: int = 0
    masked: bool = False
    tensors: tuple[str, ...] = ()  # of the results, those that it makes


_ATTENTION = (
    Case("one tile", AttentionSize(1, 1, 1, 64, 64)),
    Case("two tiles", AttentionSize(1, 1, 1, 384, 384)),
    Case("ragged", AttentionSize(1, 2, 2, 200, 333)),
    Case("grouped, causal", AttentionSize(2, 4, 2, 300, 300, True)),
    # More than a multiprocessor each: blocks take a second tile.
    Case("many tiles", AttentionSize(3, 8, 8, 1100, 1100, True)),
    Case("2k, causal", AttentionSize(1, 4, 4, 2048, 2048, True)),
    Case("2k", AttentionSize(1, 4, 4, 2048, 2048), "float16"),
)
# 128 columns a tile are taken where 256 would leave multiprocessors idle.
_LINEAR = (
    Case("one tile", LinearSize(128, 64, 128)),
    Case("two tiles", LinearSize(256, 256, 256)),
    Case("ragged", LinearSize(150, 200, 300)),
    Case("odd", LinearSize(77, 33, 19)),
    Case("many tiles", LinearSize(2048, 256, 2048)),
    Case("784-128", LinearSize(1024, 784, 128), "float16"),
)
_WIDE = (
    Case("many wide tiles", LinearSize(2304, 2304, 2304)),
    Case("many wide tiles, ragged", LinearSize(2310, 2200, 2500)),
    Case("8192x4096->4096", LinearSize(8192, 4096, 4096), "float16"),
)
# A product whose sum is split over blocks: of the forward, of dX, of dW.
_SPLIT = (
    Case("deep", LinearSize(128, 4096, 128)),
    Case("deep dX", LinearSize(128, 128, 4096)),
    Case("deep dW", LinearSize(4096, 128, 128)),
    Case("deep, ragged", LinearSize(150, 5000, 70), "float16"),
)
_MLP = (
    Case("one tile", MlpSize(64, 64, 128, 10)),
    Case("784-128-10", MlpSize(100, 784, 128, 10)),
    Case("wide", MlpSize(300, 784, 200, 10)),
    Case("many rows", MlpSize(10000, 784, 128, 10), "float16"),
)

_GRADIENTS = ("dq", "dk", "dv")
KERNELS: dict[str, Kernel] = {
    "attention_forward64": Kernel("attention", head_dim=64, tensors=("out", "lse")),
    "attention_forward128": Kernel("attention", head_dim=128, tensors=("out", "lse")),
    "attention_forward256": Kernel("attention", head_dim=256, tensors=("out", "lse")),
    "attention_forward_masked": Kernel("attention", False, 128, True, ("out", "lse")),
    "attention_backward64": Kernel("attention", True, 64, tensors=_GRADIENTS),
    "attention_backward128": Kernel("attention", True, 128, tensors=_GRADIENTS),
    "attention_backward_masked": Kernel("attention", True, 128, True, _GRADIENTS),
    "linear_forward128": Kernel("linear", tensors=("out",)),
    "linear_forward256": Kernel("linear", tensors=("out",)),
    "linear_split": Kernel("linear", True, tensors=("out", "dx", "dw", "db")),
    "linear_grad_input": Kernel("linear", True, tensors=("dx",)),
    "linear_grad_weight": Kernel("linear", True, tensors=("dw", "db")),
    "mlp_forward": Kernel("mlp", tensors=("out",)),
    "mlp_backward": Kernel("mlp", True, tensors=("dx", "dw1", "dw2", "db1", "db2")),
}


def cases_of(name: str) -> tuple[Case, ...]:
    if KERNELS[name].op == "attention":
        return _ATTENTION
    if name == "linear_forward256":
        return _WIDE
    if name == "linear_split":
        return _SPLIT
    if name in ("linear_grad_input", "linear_grad_weight"):
        return _LINEAR + _WIDE[:2]
    return _MLP if KERNELS[name].op == "mlp" else _LINEAR


class Judgement(NamedTuple):
    passed: bool
    error: float  # ||actual - expected|| / ||expected||
    worst: float  # the largest deviation, over the largest expected value
    nan: int
    map: str  # of a result that failed; see error_map


# Relative errors of a whole result, and of an element against the largest. A result, and what is
# rounded on the way to it (probabilities, dS, hidden gradients), is off by at most half a unit,
# 2^-9 or 2^-12 of its size: five such roundings, and ten units for a single element.
_BOUNDS = {"bfloat16": (5 * 2.0**-9, 20 * 2.0**-9), "float16": (5 * 2.0**-12, 20 * 2.0**-12)}


def judge(actual: NDArray, expected: NDArray, dtype: str) -> Judgement:
    """``actual`` against ``expected``, by relative errors: zeros are wrong whatever the scale."""
    if actual.shape != expected.shape:
        raise ValueError(f"actual: expected the shape {expected.shape}, got {actual.shape}")
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        deviation = np.abs(actual - expected)
    deviation[actual == expected] = 0.0  # infinities too: of an empty row's LSE
    bad = ~np.isfinite(deviation)
    finite = np.where(np.isfinite(expected), expected, 0.0)
    largest = np.abs(finite).max(initial=0.0)
    scale = np.linalg.norm(finite)
    error = float(np.linalg.norm(deviation) / scale) if scale > 0 else float(deviation.max() > 0)
    worst = float(deviation.max(initial=0.0) / largest) if largest > 0 else error
    bound, bound_worst = _BOUNDS[dtype]
    passed = bool(not bad.any() and error <= bound and worst <= bound_worst)
    where = "" if passed else error_map(np.where(bad, np.inf, deviation), bound_worst * largest)
    return Judgement(passed, error, worst, int(np.isnan(actual).sum()), where)


def error_map(deviation: NDArray, bound: float) -> str:
    """Eight rows of eight: row % 64 by column % 64, eight of each to a place.

    A place is '.' within the bound, '1' to '9' for up to 2, 4, ... 512 times the bound, '#' for
    more, NaN or inf. What is wrong shows as a pattern: rows of a warp, columns of a swizzle, an
    edge.
    """
    matrix = (
        deviation.reshape(-1, deviation.shape[-1]) if deviation.ndim > 1 else deviation[:, None]
    )
    places = np.zeros((8, 8))
    rows, columns = (np.arange(n) % 64 // 8 for n in matrix.shape)
    by_row = np.zeros((8, matrix.shape[1]))
    np.maximum.at(by_row, rows, matrix)
    np.maximum.at(places.T, columns, by_row.T)
    return "/".join("".join(_place(x, bound) for x in row) for row in places)


def _place(deviation: float, bound: float) -> str:
    if deviation <= bound:
        return "."
    if not np.isfinite(deviation) or bound <= 0:
        return "#"
    doublings = int(np.ceil(np.log2(deviation / bound)))
    return str(max(1, doublings)) if doublings <= 9 else "#"
