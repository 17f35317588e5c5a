"""Blocks of models whose forward is known by its code: a linear layer with what follows it, a norm.

Most encoders and decoders of Hugging Face have the same few modules under names of their own, and
so does much other code: a Linear and an activation, with a second Linear or not; a Linear, a
dropout and the norm of the sum with a residual; a gated MLP; an RMSNorm. A module is such a block
where its forward has the very bytecode of a known one (``forwards``), whatever its class, its
children and its arguments are called. ``patch`` then gives it a subclass of its class, which
computes the block by the kernels where these may stand in (``block_kinds``), and calls the class's
own forward where not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastattn import _products
from fastattn.functional._served import readable
from fastattn.integrations import block_kinds, forwards
from fastattn.integrations.sequential import call_straight
from fastattn.nn._plain import (
    FORMER_CLASS,
    SMALL_BELOW,
    no_global_hooks,
    to_torch,
    unpickled,
)

# DistilBERT's feed-forward hands its chunks to the second.
_METHODS = ("forward", "ff_chunk")


class _Block:
    """What the subclasses that ``patch`` makes add to their classes."""

    __prepare_scriptable__ = to_torch

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle, and a copy, names the former class and makes the subclass anew."""
        former = vars(self).get(FORMER_CLASS)
        if former is None or not is_block(type(self)):  # another library changed the class
            return super().__reduce_ex__(protocol)
        return unpickled, (block_class, former), dict(vars(self))


class _Known(NamedTuple):
    """What is known of a class."""

    match: forwards.Match
    kind: block_kinds.Kind


_made: dict[type[nn.Module], type[nn.Module] | None] = {}
_known: dict[type[nn.Module], _Known] = {}  # by the classes in the values above


def block_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass of a class whose forward has a known code; None for another class."""
    if kind not in _made:
        _made[kind] = _make(kind)
    return _made[kind]


def _make(kind: type[nn.Module]) -> type[nn.Module] | None:
    for name in _METHODS:
        match = forwards.match(getattr(kind, name, None))
        if match is None or match.known.kind not in block_kinds.KINDS:
            continue
        found = _Known(match, block_kinds.KINDS[match.known.kind])
        members = {
            name: _method(kind, name, found),
            "_fastattn_name": f"fastattn {kind.__name__}",
            "_fastattn_stock": kind,
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
        }
        made = type(kind.__name__, (_Block, kind), members)
        _known[made] = found
        return made
    return None


def _method(kind: type[nn.Module], name: str, found: _Known) -> Callable[..., Any]:
    """The method in place of the class's own, which it calls where the kernels may not stand in,
    and where the class has another one since."""
    match, compute = found.match, found.kind.compute
    known, arguments = match.function, match.arguments
    straight = [match.names.get(item, "") for item in match.known.items]

    @functools.wraps(known)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stock = getattr(kind, name)
        x: Any = args[-1] if args else None
        if stock is known and _is_small(self, x):
            alone = len(args) == 1 and not kwargs
            parts = _children(self, straight) if alone else None
            if parts is not None and no_global_hooks():
                return call_straight(parts, x)  # in less time than by their calls
        elif stock is known:
            given = args
            if kwargs:
                rest = arguments[len(args) :]
                given = (*args, *(kwargs[key] for key in rest if key in kwargs))
            if len(given) == len(arguments) == len(args) + len(kwargs):
                out: Tensor | None = compute(self, match, *given)
                if out is not None:
                    return out
        return stock(self, *args, **kwargs)

    return method


def _children(module: nn.Module, names: list[str]) -> list[nn.Module] | None:
    """The children of these names; None for no name, and where a name is not a child's."""
    modules, own = module._modules, module.__dict__
    children = [None if name in own else modules.get(name) for name in names]
    found = [child for child in children if child is not None]
    return found if names and len(found) == len(names) else None


def _is_small(module: nn.Module, x: Any) -> bool:
    """A quick test before each call: whether the kernels have too little to do."""
    return (
        readable(x)
        and x.numel() < module.__dict__.get(SMALL_BELOW, 0)
        and x.dtype not in _products._LACKING
    )


class Planned(NamedTuple):
    """What ``patch`` would make of a block."""

    after: type[nn.Module]
    reason: str
    small_below: int  # elements of its last argument below which torch's code runs


def planned(module: nn.Module) -> Planned | None:
    """The class that ``patch`` gives to a block, and why; None for a module that is none."""
    made = block_class(type(module))
    if made is None:
        return None
    match, kind = _known[made]
    if any(name in vars(module) for name in _METHODS):
        return None
    try:
        if not kind.fits(module, match):
            return None
        return Planned(made, kind.reason, kind.small_below(module, match))
    except AttributeError:  # a child that is not there
        return None


def is_block(kind: type) -> bool:
    """Whether ``patch`` made the class, and nobody one of it."""
    return kind in _known
