"""The size of the terms of each result before they cancel, of which a rounding may be left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from drawn import Problem
from torch import Tensor

from fastattn.testing import unit_roundoff

COTANGENT = 4.0  # the largest of normal numbers, about


def terms_of_attention(problem: Problem) -> dict[str, float]:
    """The size of the terms of each result of attention, before they cancel. In 16 bits the
    backward knows the output as it was rounded, so what cancels leaves a rounding of the terms."""

    def longest(x: Tensor) -> float:
        return float(x.double().norm(dim=-1).max()) if x.numel() else 0.0

    q, k, v = (longest(x) for x in problem.leaves[:3])
    values = problem.leaves[2].double()
    largest = float(values.abs().max()) if values.numel() else 0.0
    rows = math.prod(problem.leaves[0].shape[:-1])
    far = 4.0  # of normal numbers' rows
    dp = 1.0 + far * v * problem.dropped  # of the output's and the LSE's cotangents of about 1
    tangent = 1.0 + far * problem.scale * (k + q) + far  # of scores, in a direction of about 1
    size = {
        "result 0": problem.dropped * largest,
        "result 1": 1.0,  # a sum of weights of about 1, before the logarithm
        "gradient 0": dp * problem.scale * k,
        "gradient 1": dp * problem.scale * q * rows**0.5,
        "gradient 2": far * problem.dropped * rows**0.5,
        "gradient 3": dp * rows**0.5,
    }
    second = {f"second {n[9:]}": x * tangent + dp for n, x in size.items() if n[0] == "g"}
    n = len(problem.leaves)
    outputs = {f"second {n}": v * tangent * problem.dropped, f"second {n + 1}": tangent}
    return size | second | outputs


def terms_of_layers(problem: Problem) -> dict[str, float]:
    """The same of linear layers: products of the longest rows and columns of the weights."""

    def longest(x: Tensor, dim: int) -> float:
        return float(x.double().norm(dim=dim).max()) if x.shape[1 - dim] else 0.0

    x, weights = problem.leaves[0], problem.leaves[1 : 1 + problem.layers]
    there = back = 1.0
    for w in weights:
        there *= max(1.0, longest(w, 1))
        back *= max(1.0, longest(w, 0))
    largest = longest(x, 1) + 4.0  # and a bias
    gradient = 4.0 * max(1.0, back, there) * x.shape[0] ** 0.5
    size = {"result 0": largest * there, "gradient 0": 4.0 * back}
    size |= {f"gradient {i}": gradient * largest for i in range(1, len(problem.leaves))}
    return size | {
        f"second {i}": gradient * largest * there for i in range(1 + len(problem.leaves))
    }


def _finite(x: Tensor) -> Tensor:
    """x as a matrix of float64, with 0 for what is not finite."""
    rows = math.prod(x.shape[:-1])
    return x.detach().double().nan_to_num(0.0, 0.0, 0.0).reshape(rows, x.shape[-1])


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _share(problem: Problem) -> float:
    """The part of the roundings that an error of the accumulator is: terms that are never rounded
    to the problem's dtype count this much."""
    dtype = problem.leaves[0].dtype
    accumulator = unit_roundoff(torch.float64 if dtype == torch.float64 else torch.float32)
    return accumulator / (accumulator + unit_roundoff(dtype))


class _Layer:
    """The sums of one layer, and the terms of what an activation makes of them."""

    def __init__(self, activation: str | None, x: Tensor, w: Tensor, b: Tensor | None) -> None:
        x, w = _finite(x), _finite(w)
        bias = w.new_zeros(1, w.shape[0]) if b is None else _finite(b)
        self.largest = _largest(x @ w.T + bias)  # sum
        self.terms = _largest(x.norm(dim=1)) * _largest(w.norm(dim=1)) + _largest(bias)  # of sums
        self.columns = _largest(x.norm(dim=0))
        self.back = _largest(w.norm(dim=0))
        squares = activation == "relu2"
        self.slope = 2.0 * self.largest if squares else 1.2  # the largest
        self.value = self.largest**2 if squares else self.largest  # the largest
        self.of_value = self.slope * self.terms  # the terms that move a value
        self.of_slope = 2.0 * self.terms  # a second derivative is 2 at most


def terms_of_activated_layers(
    activation: str | None,
    biases_of: Callable[[Sequence[Tensor]], list[Tensor | None]],
    problem: Problem,
) -> dict[str, float]:
    """Of layers on one input: the sums are the accumulator's, their slope is rounded."""
    x, biases, share = problem.leaves[0], biases_of(problem.leaves), _share(problem)
    rows, found, place = math.prod(x.shape[:-1]), {"gradient 0": 0.0}, 1 + len(biases)
    for number, bias in enumerate(biases):
        layer = _Layer(activation, x, problem.leaves[1 + number], bias)
        found[f"result {number}"] = share * layer.of_value * problem.dropped
        gradient = COTANGENT * problem.dropped * (layer.slope + share * layer.of_slope)
        found["gradient 0"] += gradient * layer.back
        found[f"gradient {1 + number}"] = gradient * layer.columns
        if bias is not None:
            found[f"gradient {place}"] = gradient * rows**0.5
            place += 1
    return found


def terms_of_gated(
    activation: str | None,
    biases_of: Callable[[Sequence[Tensor]], list[Tensor | None]],
    problem: Problem,
) -> dict[str, float]:
    """Of f(gate) times up: the sums are the accumulator's, what each is multiplied by in the
    backward is rounded."""
    x, biases, share = problem.leaves[0], biases_of(problem.leaves), _share(problem)
    gate, up = (
        _Layer(f, x, w, b)
        for f, w, b in zip((activation, None), problem.leaves[1:3], biases, strict=True)
    )
    rows, found, place = math.prod(x.shape[:-1]), {"gradient 0": 0.0}, 3
    found["result 0"] = share * (gate.of_value * up.largest + gate.value * up.terms)
    of_gate = gate.slope * up.largest
    of_gate += share * (gate.of_slope * up.largest + gate.slope * up.terms)
    of_up = gate.value + share * gate.of_value
    for number, (layer, size) in enumerate(((gate, of_gate), (up, of_up))):
        found["gradient 0"] += COTANGENT * size * layer.back
        found[f"gradient {1 + number}"] = COTANGENT * size * layer.columns
        if biases[number] is not None:
            found[f"gradient {place}"] = COTANGENT * size * rows**0.5
            place += 1
    return found


def terms_of_activation(activation: str | None, problem: Problem) -> dict[str, float]:
    """Of activations alone: far below 0 an exponential's argument is rounded, and two parts of a
    slope cancel."""
    if activation in (None, "relu", "relu2"):
        return {}
    share = _share(problem) * problem.dropped
    return {
        "result 0": share * _largest(_finite(problem.leaves[0])),
        "gradient 0": share * COTANGENT,
    }


def terms_of_norm(
    places: list[str], eps: float, rms: bool, sum_of: Callable[[], Tensor], problem: Problem
) -> dict[str, float]:
    """Of a norm of a sum: the sum is rounded, and its error is divided by the row's deviation."""
    given = {name: _finite(x) for name, x in zip(places, problem.leaves, strict=True)}
    z = _finite(sum_of())
    zeros = z.new_zeros(z.shape)
    terms = (given["input"] * problem.dropped).abs() + given.get("residual", zeros).abs()
    if not z.numel():
        return {}
    centred = z if rms else z - z.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1) + eps).rsqrt()  # [rows]
    error = terms.amax(-1) * inverse  # of the norm, in roundings
    normal = centred.abs().amax(-1) * inverse  # the largest of the norm
    weight = _largest(given.get("weight", torch.ones(1, 1)))
    gradient = inverse * COTANGENT * weight * (1.0 + error * (1.0 + normal))
    through, rows = _largest(gradient) + COTANGENT, z.shape[0] ** 0.5
    of = {"input": through * problem.dropped, "residual": through}
    of |= {"weight": COTANGENT * rows * _largest(normal + error), "bias": COTANGENT * rows}
    found = {f"gradient {n}": of[name] for n, name in enumerate(places)}
    found["result 0"] = _largest(error) * weight + _largest(given.get("bias", zeros))
    return found | {"result 1": _largest(terms)}
