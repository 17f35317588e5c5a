"""The nodes of a graph of torch's functions, and what the report says of them."""

from __future__ import annotations

import inspect
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastattn import backends
from fastattn.functional import drop_in, inference
from fastattn.functional._torch_internals import FakeTensor
from fastattn.integrations.report import CompileReport

LINEAR = F.linear
GETITEM = operator.getitem
RELUS = (torch.relu, torch.relu_, F.relu, F.relu_)
ADDS = (operator.add, torch.add, "add", "__add__")
IN_PLACE_ADD = operator.iadd
FACTORS = (operator.mul, torch.mul, "mul", "__mul__")
POWERS = (operator.pow, torch.pow, "pow", "__pow__")
_OURS = (drop_in.__name__, inference.__name__)
BY_SIZE = "one kernel call, where the problem is large enough to gain by it"


@dataclass
class Rewriting:
    """A graph that is being rewritten, and what the report will say of it."""

    graph: fx.Graph
    report: CompileReport
    taken: set[fx.Node] = field(default_factory=set)  # seen as part of something
    left: list[tuple[str, str, str]] = field(default_factory=list)  # name, kind, reason

    def fuse(self, name: str, before: str, after: str, why: str = BY_SIZE) -> None:
        self.report.add(name, before, after, why)

    def leave(self, node: fx.Node, kind: str, reason: str) -> None:
        self.left.append((name_of(node), kind, reason))

    def put(
        self,
        nodes: Sequence[fx.Node],
        place: fx.Node,
        function: Callable[..., object],
        call: tuple[Any, ...],
    ) -> fx.Node:
        """Puts one call before ``place`` in place of ``nodes``, see ``replace``."""
        with self.graph.inserting_before(place):
            fused = self.graph.call_function(function, call)
        self.replace(nodes, fused)
        return fused

    def replace(self, nodes: Sequence[fx.Node], fused: fx.Node) -> None:
        """Puts ``fused`` in place of ``nodes``, whose last result alone is read by others."""
        fused.meta = dict(nodes[-1].meta)
        nodes[-1].replace_all_uses_with(fused)
        for node in reversed(nodes):
            self.graph.erase_node(node)
        self.taken.update(nodes)

    def remove_without_effect(self, node: fx.Node) -> None:
        """Takes a dropout out that drops nothing, which returns its operand itself."""
        dropout = dropout_of(node)
        if dropout is not None and dropout.p == 0.0 and type(value_of(node)) is FakeTensor:
            node.replace_all_uses_with(dropout.input)
            self.graph.erase_node(node)

    def finish(self) -> None:
        """Adds to the report one entry for all that was left alone of a kind and for a reason."""
        for (kind, reason), count in Counter(entry[1:] for entry in self.left).items():
            first = next(entry[0] for entry in self.left if entry[1:] == (kind, reason))
            others = f" (and {count - 1} more)" if count > 1 else ""
            self.report.add(first + others, kind, None, reason)


def unsupported(op: str, node: fx.Node, *operands: object) -> str | None:
    """Why no kernel may compute ``node`` from ``operands``, of which some may be None, or None."""
    for x in (node, *operands):
        if x is None:
            continue
        value = value_of(x)
        values = value if isinstance(value, tuple) else (value,)
        for value in values:
            if value is None:
                continue
            if type(value) is not FakeTensor:
                return f"one of its tensors is of type {type(value).__name__}"
            if value.layout is not torch.strided or value.is_nested:
                return f"one of its tensors has the layout {value.layout}"
    value = value_of(node)
    value = value[0] if isinstance(value, tuple) else value
    return backends.why_no_kernel(op, value.device, value.dtype)


def arguments(node: fx.Node, *names: str) -> tuple[Any, ...]:
    """The node's first arguments, by position or by name; None where one is not given."""
    given = (*node.args, *(None,) * (len(names) - len(node.args)))
    return tuple(
        node.kwargs.get(name) if x is None else x for name, x in zip(names, given, strict=False)
    )


def value_of(x: object) -> Any:
    """What a node was when the graph was captured: a fake tensor, where it is a tensor."""
    return x.meta.get("example_value") if isinstance(x, fx.Node) else x


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def only_pure_between(nodes: Sequence[fx.Node]) -> bool:
    """Whether what lies between ``nodes``, and is none of them, computes tensors alone."""
    first, last = min(nodes), max(nodes)
    if first is last:
        return True
    known = set(nodes)
    return all(x in known or is_pure(x) for x in between(first, last))


def static_size(value: Tensor) -> int | None:
    """The number of elements, or None where it is not known before the call."""
    size = value.numel()
    return size if isinstance(size, int) else None


def may_set_a_mode(node: fx.Node) -> bool:
    """Whether the node may do something else than compute tensors."""
    value = value_of(node)
    values = value if isinstance(value, tuple | list) else (value,)
    return not is_input(node) and not all(isinstance(x, Tensor) for x in values)


def is_input(node: Any) -> bool:
    """Whether the node is an input of the graph, or a number read from one."""
    if node.op == "call_method" and node.target in ("item", "size"):
        node = node.args[0]
    return node.op in ("placeholder", "get_attr")


_IN_PLACE = frozenset(getattr(operator, name) for name in dir(operator)
                      if name.startswith("i") and hasattr(operator, f"__{name[1:]}__"))  # fmt: skip
_CHANGING = frozenset(f"__{f.__name__.strip('_')}__" for f in (*_IN_PLACE, operator.setitem))


def is_pure(node: fx.Node) -> bool:
    """Whether the node computes tensors or sizes and changes nothing, neither operands nor modes
    nor, but for dropout, random numbers."""
    if is_input(node):
        return True
    if value_of(node) is None or "out" in node.kwargs:
        return False
    if any(x is True for x in (*node.args, *node.kwargs.values())):
        return False  # it may be in place, or dropout
    if node.op == "call_method":
        name = str(node.target)
        # Some versions of Dynamo write a == b as a call of a.__eq__.
        return name not in _CHANGING if name.startswith("__") else not name.endswith("_")
    if node.op != "call_function" or node.target in (*_IN_PLACE, operator.setitem):
        return False
    home, name = getattr(node.target, "__module__", ""), getattr(node.target, "__name__", "_")
    if home in ("_operator", "math"):  # and_ and or_ change nothing
        return True
    return home in _OURS or (home.split(".")[0] == "torch" and not name.endswith("_"))


@dataclass(frozen=True)
class Dropout:
    """A dropout of ``input``: its probability, 0 where it drops nothing."""

    input: fx.Node
    p: float
    in_place: bool


def dropout_of(node: fx.Node) -> Dropout | None:
    """What ``node`` drops, where it is a dropout whose numbers are known."""
    if node.target is not F.dropout:
        return None
    call = inspect.signature(F.dropout).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    input, p, training, in_place = call.arguments.values()
    known = isinstance(p, Real) and isinstance(training, bool) and isinstance(in_place, bool)
    if not known or not isinstance(input, fx.Node):
        return None
    return Dropout(input, float(p) if training else 0.0, in_place)


def active_dropout_after(node: fx.Node) -> tuple[float, list[fx.Node]]:
    """The probability of the dropout that alone reads ``node``, and its node; 0 and no node where
    there is none, or a mode may change before it."""
    after = only_user(node)
    dropout = dropout_of(after) if after is not None else None
    if after is None or dropout is None or not 0.0 < dropout.p < 1.0 or modes_between(node, after):
        return 0.0, []
    return dropout.p, [after]


def modes_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether a mode (grad, autocast) may change between the two."""
    return any(map(may_set_a_mode, between(first, last)))


def is_target(node: object, targets: tuple[object, ...]) -> bool:
    """Whether the node calls one of the functions, or a method of one of the names."""
    if not isinstance(node, fx.Node) or not node.op.startswith("call_"):
        return False
    kind = str if node.op == "call_method" else object
    return any(node.target is t or (kind is str and node.target == t) for t in targets)


def label(node: fx.Node) -> str:
    if node.op == "output":
        return "the caller"
    return str(getattr(node.target, "__name__", node.target))


def name_of(node: fx.Node) -> str:
    """The module that makes the call, or the line of code."""
    stack = node.meta.get("nn_module_stack") or {"": ("", nn.Module)}
    path, kind = next(reversed(stack.values()))
    path = re.sub(r"^[LG]\['(\w+)'\]", r"\1", path)
    path = re.sub(r"\._modules\['(\w+)'\]", r".\1", path)
    path = re.sub(r"^(self|fn)(\.|$)", "", path)
    if path and (node.target is not LINEAR or issubclass(kind, nn.Linear)):
        return path
    places = re.findall(r'File "(.*)", line (\d+), in (.+)', node.meta.get("stack_trace") or "")
    if not places:
        return node.name
    file, line, function = places[-1]
    return f"{file.replace(chr(92), '/').rpartition('/')[2]}:{line} ({function})"
