"""The nodes of a graph of torch's functions, and what the report says of them."""

from __future__ import annotations

import inspect
import operator
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastattn import backends
from fastattn.functional._torch_internals import FakeTensor
from fastattn.integrations.report import CompileReport

LINEAR = F.linear
GETITEM = operator.getitem
RELUS = (torch.relu, torch.relu_, F.relu, F.relu_)
ACTIVATIONS = ("celu", "elu", "gelu", "hardswish", "leaky_relu", "mish", "prelu", "relu6", "selu",
               "sigmoid", "silu", "softmax", "softplus", "tanh")  # fmt: skip
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

    def replace(self, nodes: Sequence[fx.Node], fused: fx.Node) -> None:
        """Puts ``fused`` in place of ``nodes``, whose last result alone is read by others."""
        fused.meta = dict(nodes[-1].meta)
        nodes[-1].replace_all_uses_with(fused)
        for node in reversed(nodes):
            self.graph.erase_node(node)
        self.taken.update(nodes)

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
    return home.split(".")[0] == "torch" and not name.endswith("_")


def is_relu(node: fx.Node, operand: fx.Node) -> bool:
    if not node.args or node.args[0] is not operand:
        return False
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in RELUS


def is_activation(node: fx.Node) -> bool:
    return label(node).rstrip("_") in ACTIVATIONS


def is_off(node: fx.Node, operand: fx.Node) -> bool:
    """Whether the node is dropout that drops nothing, and returns its operand."""
    if node.target is not F.dropout or not node.args or node.args[0] is not operand:
        return False
    call = inspect.signature(F.dropout).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    return call.arguments["training"] is False or call.arguments["p"] == 0


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
