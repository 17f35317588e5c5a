"""A module's forward as a chain: which children it calls, one after the other, on its one input.

It is read from its source, statement by statement, and nothing is run: a symbolic trace would take
the value that an attribute has at the time for one that it always has. The source is believed where
it compiles to the very code that runs.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.nn._plain import RELU
from fastattn.training._unknown import NotServed


class Step(NamedTuple):
    """One operation: a child's call, a ReLU, or a reshaping of the input."""

    child: str | None = None
    reshape: Callable[[Tensor], Tensor] | None = None  # neither: a ReLU


class Reference(NamedTuple):
    """A name that the code looks up at each call, and what it found."""

    home: Mapping[str, Any] | CellType
    name: str
    value: object

    def holds(self) -> bool:
        """Whether the name still means the same object."""
        if isinstance(self.home, CellType):
            return self.home.cell_contents is self.value
        return self.home.get(self.name) is self.value


class Chain(NamedTuple):
    """What a forward does, and the names that this depends on."""

    steps: list[Step]
    references: list[Reference]


def read_forward(function: FunctionType) -> Chain:
    """The chain of ``function``, a forward of ``self`` and one input; raises NotServed where it is
    anything else."""
    definition = _definition(function.__code__)
    if definition is None:
        raise NotServed("its forward's source is not there, or is not what runs")
    return _Reader(function, definition).chain()


@lru_cache(maxsize=256)
def _definition(code: CodeType) -> ast.FunctionDef | None:
    """The source of a function's code, parsed; None where it is not to be had, or where it does not
    compile to this code."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        return None
    # A method call on an imported name may have code of its own.
    for imported in ((), code.co_names):
        if _facts(_compiled(definition, code, imported)) == _facts(code):
            return definition
    return None


def _compiled(definition: ast.FunctionDef, code: CodeType, imported: Sequence[str]) -> CodeType:
    """The code of a definition whose free names are those of ``code``, in a module that imports
    some names."""
    lines = [f"import {name}" for name in imported if name.isidentifier()]
    module = ast.parse("\n".join([*lines, f"def outer({', '.join(code.co_freevars)}): pass"]))
    outer = module.body[-1]
    assert isinstance(outer, ast.FunctionDef)
    outer.body = [definition]
    flags = code.co_flags & _FUTURE_ANNOTATIONS
    whole = compile(ast.fix_missing_locations(module), "<forward>", "exec", flags, True)
    for name in ("outer", code.co_name):
        whole = next(c for c in whole.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return whole


_FUTURE_ANNOTATIONS = 0x1000000
_KIND_OF_FUNCTION = 0x0C | inspect.CO_GENERATOR | inspect.CO_COROUTINE


def _facts(code: CodeType) -> tuple[object, ...]:
    return (
        code.co_code, repr(code.co_consts), code.co_names, code.co_varnames, code.co_freevars,
        code.co_cellvars, code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount,
        code.co_flags & _KIND_OF_FUNCTION,
    )  # fmt: skip


class _Reader:
    """Walks the statements. A value is the number of steps after which it is there: only the
    newest may be used, so that nothing branches off."""

    def __init__(self, function: FunctionType, definition: ast.FunctionDef) -> None:
        self.function, self.definition = function, definition
        self.steps: list[Step] = []
        self.references: list[Reference] = []
        arguments = definition.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        others = (arguments.vararg, arguments.kwarg, *arguments.kwonlyargs, *arguments.defaults)
        if len(names) != 2 or any(others):
            raise NotServed("its forward takes more than one input")
        self.self_name = names[0]
        self.values = {names[1]: 0}

    def chain(self) -> Chain:
        for statement in self.definition.body[:-1]:
            self.assign(statement)
        last = self.definition.body[-1]
        if not isinstance(last, ast.Return) or last.value is None:
            raise self.unknown(last)
        self.newest(last.value)
        return Chain(self.steps, self.references)

    def assign(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return  # a docstring
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise self.unknown(statement)
        target = statement.targets[0]
        if not isinstance(target, ast.Name) or target.id == self.self_name:
            raise self.unknown(statement)
        self.newest(statement.value)
        self.values[target.id] = len(self.steps)

    def newest(self, expression: ast.expr) -> None:
        """Reads an expression, which must be the newest value."""
        if isinstance(expression, ast.Call):
            self.call(expression)
        elif not self.is_newest(expression):
            raise self.unknown(expression)

    def is_newest(self, expression: ast.expr) -> bool:
        return isinstance(expression, ast.Name) and self.values.get(expression.id) == len(
            self.steps
        )

    def call(self, call: ast.Call) -> None:
        function, arguments = call.func, list(call.args)
        if isinstance(function, ast.Attribute) and self.is_self(function.value):
            self.child(function.attr, call)
            return
        found = self.resolved(function)
        if found is None and isinstance(function, ast.Attribute):
            self.newest(function.value)
            self.method(function.attr, call, arguments, function.value)
        elif found is not None and arguments:
            self.newest(arguments[0])
            if found is RELU or found is torch.relu:
                self.relu(call, arguments[1:])
            elif found is torch.flatten:
                self.flatten(call, arguments[1:])
            else:
                raise self.unknown(call)
        else:
            raise self.unknown(call)

    def child(self, name: str, call: ast.Call) -> None:
        if len(call.args) != 1 or call.keywords:
            raise self.unknown(call)
        self.newest(call.args[0])
        self.steps.append(Step(child=name))

    def method(self, name: str, call: ast.Call, arguments: list[ast.expr], on: ast.expr) -> None:
        if name == "relu":
            self.relu(call, arguments)
        elif name == "flatten":
            self.flatten(call, arguments)
        elif name in ("view", "reshape") and not call.keywords and len(arguments) == 2:
            self.reshape(name, call, arguments, on)
        else:
            raise self.unknown(call)

    def relu(self, call: ast.Call, rest: list[ast.expr]) -> None:
        if rest or call.keywords:
            raise self.unknown(call)
        self.steps.append(Step())

    def flatten(self, call: ast.Call, rest: list[ast.expr]) -> None:
        given = [*rest, *(k.value for k in call.keywords if k.arg == "start_dim")]
        if len(given) != 1 or len(call.keywords) + len(rest) != 1 or _number(given[0]) != 1:
            raise self.unknown(call)
        self.steps.append(Step(reshape=lambda x: x.flatten(1)))

    def reshape(self, name: str, call: ast.Call, extents: list[ast.expr], on: ast.expr) -> None:
        """``x.view(rows, columns)``: numbers, or the rows of x itself."""
        rows, columns = _number(extents[0]), _number(extents[1])
        if columns is None or (rows is None and not self.is_rows(extents[0], on)):
            raise self.unknown(call)

        def reshaped(x: Tensor) -> Tensor:
            shape = (x.shape[0] if rows is None else rows, columns)
            return x.view(shape) if name == "view" else x.reshape(shape)

        self.steps.append(Step(reshape=reshaped))

    def is_rows(self, expression: ast.expr, on: ast.expr) -> bool:
        """Whether it is ``on.size(0)`` or ``on.shape[0]``."""
        if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
            size, of, arguments = expression.func.attr, expression.func.value, expression.args
            if size != "size" or expression.keywords or len(arguments) != 1:
                return False
            index: ast.expr = arguments[0]
        elif isinstance(expression, ast.Subscript) and isinstance(expression.value, ast.Attribute):
            size, of = expression.value.attr, expression.value.value
            index = expression.slice
            if size != "shape":
                return False
        else:
            return False
        same = isinstance(of, ast.Name) and isinstance(on, ast.Name) and of.id == on.id
        return same and _number(index) == 0

    def is_self(self, expression: ast.expr) -> bool:
        return isinstance(expression, ast.Name) and expression.id == self.self_name

    def resolved(self, expression: ast.expr) -> object:
        """What a global name, or a name in a module, means; None for anything else."""
        if isinstance(expression, ast.Name):
            return self.lookup(expression.id)
        if isinstance(expression, ast.Attribute):
            module = self.resolved(expression.value)
            if isinstance(module, ModuleType):
                value = vars(module).get(expression.attr)
                self.references.append(Reference(vars(module), expression.attr, value))
                return value
        return None

    def lookup(self, name: str) -> object:
        code = self.function.__code__
        if name in code.co_varnames:
            return None
        if name in code.co_freevars:
            cell = (self.function.__closure__ or ())[code.co_freevars.index(name)]
            try:
                reference = Reference(cell, name, cell.cell_contents)
            except ValueError:  # it is still empty
                return None
        else:
            names = self.function.__globals__
            reference = Reference(names, name, names.get(name))
        self.references.append(reference)
        return reference.value

    def unknown(self, node: ast.AST) -> NotServed:
        text = ast.unparse(node).splitlines()[0]
        return NotServed(f"its forward has `{text}`, which is no part of a chain")


def _number(expression: ast.expr) -> int | None:
    """The integer that is written there."""
    if isinstance(expression, ast.UnaryOp) and isinstance(expression.op, ast.USub):
        number = _number(expression.operand)
        return None if number is None else -number
    value = expression.value if isinstance(expression, ast.Constant) else None
    return value if type(value) is int else None
