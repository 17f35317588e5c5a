"""A random problem, and the choices that every kind of problem makes: each from a seed and a number
alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "rows first", "in wider rows", "every other row", "expanded")
# Of queries, keys and inputs. A score is a product of two of them.
MAGNITUDES = {"1": 1.0, "30": 5.5, "300": 17.0, "4000": 63.0, "tiny": 1e-5, "subnormal": 1e-39}
MASKS = ("none", "bool", "float", "learned", "finite lowest", "infinite")
DROPOUT = (0.0, 0.1, 0.5, 0.97, 1.0)
SPECIAL = {"nan": math.nan, "infinity": math.inf, "minus infinity": -math.inf}
VALUES = {"1": 1.0, "large": 1e4, "small": 1e-4, "0": 0.0}
DROPOUT_SEED = 5  # of torch's generator, before every call


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
    # The size of the terms of each result before they cancel, by the result's name; 0 of others.
    terms: Callable[[Problem], dict[str, float]] = lambda problem: {}
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


def shared(made: Draw, orders: Sequence[int] = (0, 1, 2)) -> tuple[torch.dtype, str, int, int]:
    dtype = made.one("dtype", DTYPES)
    magnitude = made.one("magnitude", MAGNITUDES, (6, 1, 1, 1, 1, 1))
    if dtype.itemsize == 2 and magnitude == "subnormal":
        magnitude = "tiny"  # float16 has no such numbers; vdpbf16ps takes those of bfloat16 as 0
    order = made.one("order", orders, (3, 3, 2)[: len(orders)])
    return dtype, magnitude, order, made.one("threads", (1, 2), (3, 1))


def add_special_value(made: Draw, leaves: Sequence[Tensor]) -> None:
    """Makes an element of one of the leaves infinite or NaN, in one of five calls."""
    if made.rng.random() > 0.2:
        return
    x = made.rng.choice(leaves)
    if x.numel() and 0 not in x.stride():
        x[tuple(made.rng.randrange(n) for n in x.shape)] = SPECIAL[made.one("special", SPECIAL)]


def drawn_dropout(made: Draw) -> float:
    """The probability of dropping an element of a layer."""
    return made.one("dropout_p", DROPOUT, (6, 2, 2, 1, 1))
