"""Activations in a graph, called by their names or written out as formulas.

A formula is read as a polynomial in its argument z and in functions of such polynomials, as text:
``0.5 z + 0.5 z tanh(0.0356774 z z z + 0.797885 z)`` is GELU by tanh, however its author grouped it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastattn.integrations.graph.nodes import RELUS, arguments, is_target, label, value_of

Terms = dict[tuple[str, ...], float]  # the factors of each term, sorted, and its coefficient

_MOST_NODES = 16  # of a formula
_Z: Terms = {("z",): 1.0}
NAMES = {"relu": "ReLU", "gelu": "GELU", "gelu_tanh": "GELU", "silu": "SiLU", "relu2": "ReLU²",
         "quick_gelu": "quick GELU"}  # fmt: skip


@dataclass(frozen=True)
class Activation:
    """f(x) of a node x: f's name in ``fastattn.linear``, and the nodes that compute it alone."""

    name: str
    nodes: list[fx.Node]  # in the graph's order; the last is f(x)
    others: list[fx.Node]  # what else reads x, or what is between


def find_activation(x: fx.Node) -> Activation | None:
    """The activation that reads ``x``: the longest that nobody else reads the inside of, else the
    first."""
    formulas = _formulas_of(x)
    found: Activation | None = None
    for node, terms in formulas.items():
        name = _KNOWN.get(_text(terms)) if node is not x else None
        if name is None:
            continue
        inside = _inside(node, x)
        others = _other_readers(x, inside)
        if found is None or not others:
            found = Activation(name, inside, others)
    return found


def _other_readers(x: fx.Node, inside: list[fx.Node]) -> list[fx.Node]:
    """Who else reads ``x`` or what is computed on the way to the last node. An operation in place
    must be the only one that reads its operand."""
    changed = {operand for node in inside if _in_place(node) for operand in node.all_input_nodes}
    return [
        user
        for node in (x, *inside[:-1])
        for user in node.users
        if user not in inside or (node in changed and not _in_place(user))
    ]


def _in_place(node: fx.Node) -> bool:
    return label(node).endswith("_") or bool(arguments(node, "input", "inplace")[1] is True)


def _formulas_of(x: fx.Node) -> dict[fx.Node, Terms]:
    """The nodes that are formulas of ``x`` alone, in the graph's order."""
    formulas, grown = {x: _Z}, True
    while grown and len(formulas) < _MOST_NODES:
        grown = False
        for user in [user for node in formulas for user in node.users]:
            if user not in formulas and (terms := _formula(user, formulas)) is not None:
                formulas[user], grown = terms, True
    return formulas


def _inside(node: fx.Node, x: fx.Node) -> list[fx.Node]:
    """The nodes on the way from ``x`` to ``node``, which comes last."""
    found, waiting = {node}, [node]
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand is not x and operand not in found:
                found.add(operand)
                waiting.append(operand)
    return sorted(found)


def _formula(node: fx.Node, formulas: dict[fx.Node, Terms]) -> Terms | None:
    """What ``node`` computes of formulas and numbers; None where it is no polynomial of them, or
    has another dtype."""
    read = next((read for targets, read in _READ if is_target(node, targets)), None)
    value = value_of(node)
    if read is None or not isinstance(value, Tensor):
        return None
    operands = [x for x in node.all_input_nodes if x in formulas]
    if len(operands) != len(node.all_input_nodes):
        return None
    if any(value_of(x).dtype != value.dtype for x in operands):
        return None
    return read(node, lambda x: _operand(x, formulas))


def _operand(x: object, formulas: dict[fx.Node, Terms]) -> Terms | None:
    if isinstance(x, fx.Node):
        return formulas.get(x)
    if isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x) and x:
        return {(): float(x)}
    return None


# --- polynomials ----------------------------------------------------------------------------------


def _sum(a: Terms | None, b: Terms | None) -> Terms | None:
    """a + b; None where two terms would become one, whose rounding is then the code's own."""
    if a is None or b is None or set(a) & set(b):
        return None
    return {**a, **b}


def _product(a: Terms | None, b: Terms | None) -> Terms | None:
    if a is None or b is None:
        return None
    terms: Terms = {}
    for one, c in a.items():
        for other, d in b.items():
            factors = tuple(sorted((*one, *other)))
            if factors in terms or len(factors) > _MOST_NODES:
                return None
            terms[factors] = c * d
    return terms


def _of(function: str, a: Terms | None) -> Terms | None:
    return None if a is None else {(f"{function}({_text(a)})",): 1.0}


def _text(a: Terms) -> str:
    return " + ".join(" ".join((f"{c:.6g}", *factors)) for factors, c in sorted(a.items()))


def _gelu(z: Terms | None) -> Terms | None:
    half = _product(z, {(): 0.5})
    return _product(half, _sum({(): 1.0}, _of("erf", _product(z, {(): 0.5**0.5}))))


def _gelu_tanh(z: Terms | None) -> Terms | None:
    cube = _product(z, _product(z, _product(z, {(): 0.044715})))
    inner = _product(_sum(z, cube), {(): math.sqrt(2.0 / math.pi)})
    return _product(_product(z, {(): 0.5}), _sum({(): 1.0}, _of("tanh", inner)))


def _silu(z: Terms | None) -> Terms | None:
    return _product(z, _of("sigmoid", z))


_KNOWN = {
    _text(terms): name
    for name, terms in {
        "relu": _of("relu", _Z),
        "gelu": _gelu(_Z),
        "gelu_tanh": _gelu_tanh(_Z),
        "silu": _silu(_Z),
        "relu2": _product(_of("relu", _Z), _of("relu", _Z)),
        "quick_gelu": _product(_Z, _of("sigmoid", {("z",): 1.702})),
    }.items()
    if terms is not None
}

# --- nodes ----------------------------------------------------------------------------------------

Operand = Callable[[object], "Terms | None"]
Read = Callable[[fx.Node, Operand], "Terms | None"]


def _binary(combine: Callable[[Terms | None, Terms | None], Terms | None]) -> Read:
    def read(node: fx.Node, operand: Operand) -> Terms | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        return combine(operand(node.args[0]), operand(node.args[1]))

    return read


def _divided(a: Terms | None, b: Terms | None) -> Terms | None:
    return _product(a, {(): 1.0 / b[()]}) if b is not None and set(b) == {()} else None


def _unary(function: str) -> Read:
    def read(node: fx.Node, operand: Operand) -> Terms | None:
        alone = len(node.args) == 1 and not node.kwargs
        return _of(function, operand(node.args[0])) if alone else None

    return read


def _relu(node: fx.Node, operand: Operand) -> Terms | None:
    return _of("relu", operand(arguments(node, "input")[0]))


def _called_silu(node: fx.Node, operand: Operand) -> Terms | None:
    return _silu(operand(arguments(node, "input")[0]))


def _called_gelu(node: fx.Node, operand: Operand) -> Terms | None:
    x, approximate = arguments(node, "input", "approximate")
    read = {None: _gelu, "none": _gelu, "tanh": _gelu_tanh}.get(approximate)
    return read(operand(x)) if read else None


def _power(node: fx.Node, operand: Operand) -> Terms | None:
    if len(node.args) != 2 or node.kwargs or node.args[1] not in (2, 3):
        return None
    x = operand(node.args[0])
    return _product(x, x if node.args[1] == 2 else _product(x, x))


def _square(node: fx.Node, operand: Operand) -> Terms | None:
    x = operand(arguments(node, "input")[0])
    return _product(x, x)


def _names(*names: str) -> tuple[Any, ...]:
    """A function of torch and of operator by these names, and the method."""
    homes = (torch, operator)
    found = (getattr(home, name, None) for name in names for home in homes)
    return (*(f for f in found if f is not None), *names)


_READ: Iterable[tuple[tuple[Any, ...], Read]] = (
    (_names("add"), _binary(_sum)),
    (_names("mul", "multiply"), _binary(_product)),
    (_names("div", "truediv"), _binary(_divided)),
    (_names("pow"), _power),
    (_names("square"), _square),
    (_names("tanh"), _unary("tanh")),
    (_names("sigmoid"), _unary("sigmoid")),
    (_names("erf"), _unary("erf")),
    ((*RELUS, "relu", "relu_"), _relu),
    ((F.silu,), _called_silu),
    ((F.gelu,), _called_gelu),
)
