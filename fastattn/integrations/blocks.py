"""Blocks of models whose forward is known by its code: a linear layer with what follows it.

Most encoders of Hugging Face have the same two modules under names of their own: a Linear and an
activation; a Linear, a dropout and the norm of the sum with a residual. The decoders of the Llama
family have a gated MLP. A module is such a block where its forward has the very bytecode of a
template below, whatever its class, its children and its arguments are called. ``patch`` then gives
it a subclass of its class, which computes the block by the kernels where these may stand in, and
calls the class's own forward where not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import functional
from fastattn.functional._served import (
    is_small_product,
    ordinary,
    serves_layers,
    serves_norm,
    unobserved,
)
from fastattn.nn._plain import (
    FORMER_CLASS,
    active_dropout,
    fused_activation,
    has_hooks,
    is_plain,
    no_global_hooks,
    to_torch,
    unpickled,
)
from fastattn.nn.linear import is_plain_linear

# --- templates: never called, their code is compared ----------------------------------------------


class _Activated:
    def forward(self, hidden_states):
        hidden_states = self.dense(hidden_states)
        hidden_states = self.activation(hidden_states)
        return hidden_states


class _Normed:
    def forward(self, hidden_states, input_tensor):
        hidden_states = self.dense(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.norm(hidden_states + input_tensor)
        return hidden_states


class _Gated:
    def forward(self, x):
        down_proj = self.down(self.activation(self.gate(x)) * self.up(x))
        return down_proj


class _Block:
    """What the subclasses that ``patch`` makes add to their classes."""

    __prepare_scriptable__ = to_torch
    _fastattn_children: tuple[str, ...]  # in the order of the template
    _fastattn_arguments: tuple[str, ...]  # of forward, without self
    _fastattn_code: tuple[FunctionType]  # the class's forward that is known

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self._fastattn_arguments
        given = (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
        known = super().forward.__func__ is self._fastattn_code[0]  # type: ignore[misc]
        if known and len(given) == len(names) == len(args) + len(kwargs):
            out = self._fastattn_forward(*given)
            if out is not None:
                return out
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _fastattn_forward(self, *given: Any) -> Tensor | None:
        """The block by the kernels, or None where these may not stand in."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle, and a copy, names the former class and makes the subclass anew."""
        former = vars(self).get(FORMER_CLASS)
        if former is None or not is_block(type(self)):  # another library changed the class
            return super().__reduce_ex__(protocol)
        return unpickled, (block_class, former), dict(vars(self))

    def _fastattn_parts(self) -> list[Any]:
        return [getattr(self, name) for name in self._fastattn_children]


class _ActivatedBlock(_Block):
    def _fastattn_forward(self, x: Tensor) -> Tensor | None:
        linear, activation = self._fastattn_parts()
        name = activation_of(activation)
        if name is None or not _fuses(linear, x):
            return None
        return functional.linear(x, linear.weight, linear.bias, name)


class _NormedBlock(_Block):
    def _fastattn_forward(self, x: Tensor, residual: Tensor) -> Tensor | None:
        linear, dropout, norm = self._fastattn_parts()
        p = active_dropout(dropout)
        if (
            not p  # without dropout torch's sum and norm are as fast
            or not is_plain(norm, nn.LayerNorm)
            or not no_global_hooks()
            or not unobserved()
            or x is None
            or residual is None
            or not ordinary(x, residual)
            or norm.normalized_shape != residual.shape[-1:]
            or not serves_norm(residual, norm.weight, norm.bias)
        ):
            return None
        out = linear(x)
        if out.shape != residual.shape:  # torch's sum broadcasts, or refuses
            return norm(dropout(out) + residual)
        return functional.dropout_add_norm(out, residual, norm.weight, norm.bias, p, norm.eps)


class _GatedBlock(_Block):
    def _fastattn_forward(self, x: Tensor) -> Tensor | None:
        down, activation, gate, up = self._fastattn_parts()
        name = activation_of(activation)
        if (
            name is None
            or not _fuses(gate, x)
            or not _fuses(up, x)
            or gate.weight.shape != up.weight.shape
        ):
            return None
        tensors = (gate.weight, up.weight, None, gate.bias, up.bias)
        return down(functional.gated_mlp(x, *tensors, activation=name))


def _fuses(linear: Any, x: Tensor) -> bool:
    return (
        is_plain_linear(linear)
        and no_global_hooks()
        and unobserved()
        and ordinary(x)
        and serves_layers(x, [linear.weight], [linear.bias])
        and not is_small_product(x, linear.weight.numel())
    )


class _Kind(NamedTuple):
    code: CodeType
    block: type[_Block]
    fits: Callable[[list[Any]], bool]
    reason: str


def _fits_activated(parts: list[Any]) -> bool:
    linear, activation = parts
    return type(linear) is nn.Linear and activation_of(activation) is not None


def _fits_normed(parts: list[Any]) -> bool:
    linear, dropout, norm = parts
    return (
        isinstance(linear, nn.Linear) and type(dropout) is nn.Dropout and type(norm) is nn.LayerNorm
    )


def _fits_gated(parts: list[Any]) -> bool:
    down, activation, gate, up = parts
    linears = all(type(m) is nn.Linear for m in (gate, up))
    return linears and isinstance(down, nn.Module) and activation_of(activation) is not None


_KINDS = (
    _Kind(_Activated.forward.__code__, _ActivatedBlock, _fits_activated,
          "a Linear and its activation as one kernel call"),
    _Kind(_Normed.forward.__code__, _NormedBlock, _fits_normed,
          "dropout, residual sum and norm as one kernel call in training"),
    _Kind(_Gated.forward.__code__, _GatedBlock, _fits_gated,
          "both products of a gated MLP as one kernel call"),
)  # fmt: skip


def _same_code(a: CodeType, b: CodeType) -> bool:
    """Whether two functions do the same with attributes and arguments of any names."""
    facts = ("co_code", "co_argcount", "co_kwonlyargcount", "co_nlocals")
    kinds = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR
    return (
        all(getattr(a, fact) == getattr(b, fact) for fact in facts)
        and a.co_flags & kinds == b.co_flags & kinds
        and len(a.co_names) == len(b.co_names)
        and a.co_consts[1:] == b.co_consts[1:]  # the first is the docstring's place
        and not (a.co_freevars or a.co_cellvars)
    )


_made: dict[type[nn.Module], type[nn.Module] | None] = {}


def block_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass of a class whose forward has the code of a template; None for another class."""
    if kind not in _made:
        _made[kind] = _make(kind)
    return _made[kind]


def _make(kind: type[nn.Module]) -> type[nn.Module] | None:
    function = kind.forward
    if not isinstance(function, FunctionType) or function.__closure__ or function.__defaults__:
        return None
    for known in _KINDS:
        if _same_code(function.__code__, known.code):
            members = {
                "_fastattn_children": function.__code__.co_names,
                "_fastattn_arguments": function.__code__.co_varnames[
                    1 : function.__code__.co_argcount
                ],
                "_fastattn_code": (function,),
                "_fastattn_kind": known,
                "_fastattn_name": f"fastattn {kind.__name__}",
                "__module__": kind.__module__,
                "__qualname__": kind.__qualname__,
                "__doc__": kind.__doc__,
            }
            return type(kind.__name__, (known.block, kind), members)
    return None


def planned(module: nn.Module) -> tuple[type[nn.Module], str] | None:
    """The class that ``patch`` gives to a block, and why; None for a module that is none."""
    kind: Any = block_class(type(module))
    if kind is None or "forward" in vars(module):
        return None
    known: _Kind = kind._fastattn_kind
    names = kind._fastattn_children
    if not all(hasattr(module, name) for name in names):  # an activation may be a function
        return None
    parts = [getattr(module, name) for name in names]
    return (kind, known.reason) if known.fits(parts) else None


def is_block(kind: type) -> bool:
    """Whether ``patch`` made the class, and nobody one of it."""
    return issubclass(kind, _Block) and kind in _made.values()


_TANH = {"approximate": "tanh"}


def activation_of(activation: object) -> str | None:
    """The activation's name in ``fastattn.linear``: torch's functions and modules, and those of
    transformers that call nothing else."""
    name = fused_activation(activation)
    if name is not None or not isinstance(activation, nn.Module):
        return name
    kind = type(activation)
    if kind.__module__ != "transformers.activations" or "forward" in vars(activation):
        return None
    if has_hooks(activation):
        return None
    act: Any = getattr(activation, "act", None)
    if kind.__name__ == "GELUActivation":
        return "gelu" if act is F.gelu else None
    if kind.__name__ == "GELUTanh":
        tanh = isinstance(act, partial) and act.func is F.gelu and act.keywords == _TANH
        return "gelu_tanh" if tanh else None
    return {
        "NewGELUActivation": "gelu_tanh",
        "QuickGELUActivation": "quick_gelu",
        "SiLUActivation": "silu",
        "ReLUSquaredActivation": "relu2",
    }.get(kind.__name__)
