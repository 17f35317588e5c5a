"""Forwards that are known by their bytecode.

A known forward is written as text. A name of one letter stands for any name: ``self.a`` for a child
or a parameter, ``G.H`` for a function that the code finds among its module's globals, other letters
for variables. Every other name stands for itself, and a global one for what it means here. The text
is compiled by the running Python and its code is compared, never run.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

# No known forward has one of these names as that of an attribute.
_GLOBALS: dict[str, Any] = {"torch": torch, "isinstance": isinstance}


class Known(NamedTuple):
    """A forward that is known."""

    kind: str  # what it computes: a key of ``block_kinds.KINDS``
    items: tuple[str, ...]  # of a chain, in the order of their calls
    code: CodeType
    literals: tuple[str, ...]  # global names that must mean what they mean here


class Match(NamedTuple):
    """A class's function with the code of a known forward."""

    known: Known
    function: Any  # a FunctionType, which type checkers take for a method here
    names: dict[str, str]  # the function's name of each of one letter
    arguments: tuple[str, ...]  # without self

    def value(self, module: nn.Module, item: str) -> Any:
        """What ``item`` is for a module: an attribute, or by a dotted path of capital letters
        something among the globals. AttributeError where it is not there."""
        if item.islower():
            return getattr(module, self.names[item])
        first, *rest = item.split(".")
        found = _global(self.function, self.names[first])
        for letter in rest:
            found = getattr(found, self.names[letter])
        return found

    def values(self, module: nn.Module, items: Iterable[str]) -> list[Any] | None:
        """What the items are; None where one is not there: the module's code tells."""
        try:
            return [self.value(module, item) for item in items]
        except AttributeError:
            return None

    def means_the_same(self) -> bool:
        """Whether the global names of the known forward still mean what they mean here."""
        return all(_global(self.function, name) is _GLOBALS[name] for name in self.known.literals)


def _global(function: FunctionType, name: str) -> Any:
    return function.__globals__.get(name, getattr(builtins, name, None))


def match(function: object) -> Match | None:
    """The known forward that a function has the code of; None for another one."""
    found = _match(function) if isinstance(function, FunctionType) else None
    return found if found is not None and found.means_the_same() else None


@functools.lru_cache(maxsize=1024)
def _match(function: FunctionType) -> Match | None:
    if function.__closure__ or function.__defaults__:
        return None
    code = function.__code__
    for known in _known().get(_key(code), ()):
        names = _names(known.code, code)
        if names is not None:
            arguments = code.co_varnames[1 : code.co_argcount]
            return Match(known, function, names, arguments)
    return None


def _names(template: CodeType, code: CodeType) -> dict[str, str] | None:
    """The code's name of each name of one letter; None where another name differs."""
    names: dict[str, str] = {}
    for theirs, name in zip(template.co_names, code.co_names, strict=True):
        if len(theirs) == 1:
            names[theirs] = name
        elif theirs != name:
            return None
    return names


def _key(code: CodeType) -> tuple[Any, ...]:
    """Equal for functions that do the same with attributes and variables of any names."""
    kinds = (
        inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
    )
    constants = list(code.co_consts)
    if constants and isinstance(constants[0], str | None):
        constants[0] = None  # the docstring's place
    return (
        code.co_code,
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_nlocals,
        code.co_flags & kinds,
        len(code.co_names),
        tuple((type(c), c) for c in constants),
        code.co_freevars + code.co_cellvars,
    )


@functools.cache
def _known() -> Mapping[tuple[Any, ...], list[Known]]:
    found: dict[tuple[Any, ...], list[Known]] = {}
    for kind, items, source in _sources():
        (code,) = (c for c in compile(source, "<known>", "exec").co_consts if type(c) is CodeType)
        alike = found.setdefault(_key(code), [])
        if not any(known.code.co_names == code.co_names for known in alike):
            alike.append(Known(kind, items, code, tuple(_literals(code.co_names))))
    return found


def _literals(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if name in _GLOBALS)


def _sources() -> Iterator[tuple[str, tuple[str, ...], str]]:
    for items in _CHAINS:
        for source in dict.fromkeys(s for body in _bodies(items) for s in _functions("x", body)):
            yield "chain", items, source
    for kind, forwards in _FORWARDS.items():
        for text in forwards:
            arguments, *body = (line.strip() for line in text.split(";"))
            for source in _functions(arguments, body):
                yield kind, (), source


def _functions(arguments: str, body: list[str]) -> Iterator[str]:
    """The function in a module that imports its globals, and in one that does not (a cell of a
    notebook), where Python calls their functions by other instructions."""
    source = f"def forward(self, {arguments}):\n" + "".join(f" {line}\n" for line in body)
    yield source
    if "torch." in source or "G.H(" in source:
        yield f"import torch, G\n{source}"


# Calls one after the other, each of the result before it: a Linear and an activation (BERT); with a
# second Linear (ViT, CLIP, GPT-NeoX, OPT), and with a dropout behind it (GPT-2, DistilBERT) or
# before it as well, another one (Wav2Vec2) or the same (PVT), and a norm (timm); three Linears with
# one activation. The activation may be a function.
_CHAINS = (
    ("a", "b"),
    ("a", "G.H"),
    *(
        ("a", second, *rest)
        for second in ("b", "G", "G.H", "G.H.I")
        for rest in (("c",), ("c", "d"), ("c", "d", "e"), ("c", "d", "c"), ("c", second, "d"))
    ),
    ("a", "b", "c", "d", "e", "f"),
)


def _bodies(items: tuple[str, ...]) -> Iterator[list[str]]:
    """The ways to write the chain: its calls nested or not, their results in one variable or in
    several, the last result returned by its name or not."""
    nested = (False, True) if len(items) < 6 else (True,)  # or a call a line
    for cuts in itertools.product(nested, repeat=len(items) - 1):
        steps: list[list[str]] = [[items[0]]]
        for cut, item in zip(cuts, items[1:], strict=True):
            if cut:
                steps.append([])
            steps[-1].append(item)
        for variables in ("x" * 6, "y" * 6, *(["yzuv"] if len(items) < 5 else [])):
            for returned in (False, True):
                yield _body(steps, variables, returned)


def _body(steps: list[list[str]], variables: str, returned: bool) -> list[str]:
    lines, value = [], "x"
    for step, variable in zip(steps, variables, strict=False):
        for item in step:
            value = f"{'self.' if item.islower() else ''}{item}({value})"
        lines.append(f"{variable} = {value}")
        value = variable
    if returned:
        lines[-1] = f"return {lines[-1].partition(' = ')[2]}"
        return lines
    return [*lines, f"return {value}"]


_NORMALISED = (
    "d = x.dtype; x = x.to(torch.float32); v = x.pow(2).mean(-1, keepdim=True);"
    "x = x * torch.rsqrt(v + self.e);"
)
_DTYPE_OF_OUT = (
    "if isinstance(self.o.weight, torch.Tensor) and x.dtype != self.o.weight.dtype"
    " and self.o.weight.dtype != torch.int8: x = x.to(self.o.weight.dtype)"
)
_FORWARDS = {
    # BERT and its kin
    "normed": (
        "x, r; x = self.l(x); x = self.p(x); x = self.n(x + r); return x",
    ),
    # a: activation, g: gate, u: up, o: out, p: dropout
    "gated": (
        "x; y = self.o(self.a(self.g(x)) * self.u(x)); return y",  # Llama, Mistral, Gemma
        "x; return self.o(self.a(self.g(x)) * self.u(x))",  # Qwen2
        "x; return self.o(G.H(self.g(x)) * self.u(x))",
        "x; return self.o(G.H.I(self.g(x)) * self.u(x))",
        "x; y = G.H(self.g(x)); y = y * self.u(x); y = self.o(y); return y",
    ),
    # T5 and its kin
    "gated to dtype": (
        "x; y = self.a(self.g(x)); z = self.u(x); x = y * z; x = self.p(x);"
        f"{_DTYPE_OF_OUT}; x = self.o(x); return x",
    ),
    "chain to dtype": (
        f"x; x = self.g(x); x = self.a(x); x = self.p(x); {_DTYPE_OF_OUT}; x = self.o(x); return x",
    ),
    "conv1d": (
        "x; s = x.size()[:-1] + (self.f,); x = torch.addmm(self.b, x.view(-1, x.size(-1)), self.w);"
        "x = x.view(s); return x",
    ),
    # RMSNorm by when the product with the weight is rounded
    "rms norm, then rounded": (f"x; {_NORMALISED} return (self.w * x).to(d)",),  # OLMo 2
    "rms norm": (f"x; {_NORMALISED} return self.w * x.to(d)",),  # Llama, Mistral, Qwen
    "rms norm in one dtype": (
        "x; v = x.to(torch.float32).pow(2).mean(-1, keepdim=True); x = x * torch.rsqrt(v + self.e);"
        "if self.w.dtype in [torch.float16, torch.bfloat16]: x = x.to(self.w.dtype);"
        "return self.w * x",  # T5
    ),
    "rms norm plus one": (
        "x; y = self.n(x.float()); y = y * (1.0 + self.w.float()); return y.type_as(x)",  # Gemma
    ),
    "rms norm by a method": (
        "x; y = self.n(x.float()).type_as(x); return y * self.w",  # Meta's Llama
    ),
    "normalised": (
        "x; return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.e)",  # Gemma's method n
    ),
}  # fmt: skip
