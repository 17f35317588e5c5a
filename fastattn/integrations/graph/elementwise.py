"""Activations and dropout in a graph that no linear layer and no norm has taken."""

from __future__ import annotations

from torch import Tensor, fx

from fastattn.functional import _served, drop_in
from fastattn.integrations.graph.activations import find_activation
from fastattn.integrations.graph.nodes import (
    Rewriting,
    active_dropout_after,
    dropout_of,
    label,
    name_of,
    only_pure_between,
    static_size,
    unsupported,
    value_of,
)


def put_elementwise(rewriting: Rewriting, node: fx.Node) -> None:
    """The activation of ``node`` and the dropout behind it, or ``node`` itself, a dropout."""
    value = value_of(node)
    if isinstance(value, Tensor) and value.dim() > 0 and value.is_floating_point():
        _put_activation(rewriting, node)
        if node not in rewriting.taken:
            _put_dropout(rewriting, node)


def _put_activation(rewriting: Rewriting, node: fx.Node) -> None:
    found = find_activation(node)
    if found is None or found.others or rewriting.taken.intersection(found.nodes):
        return
    dropout_p, dropout = active_dropout_after(found.nodes[-1])
    nodes = [*found.nodes, *dropout]
    size = static_size(value_of(node))
    least = _served.least_activation(found.name, dropout_p)
    written = len(found.nodes) > 1 and found.name == "gelu_tanh"  # torch has a function for it
    if least is None or (size is not None and size < least and not written):
        return
    if _unsupported(node) is not None or not only_pure_between(nodes):
        return
    kind = ", ".join([found.name, *(["dropout"] if dropout else [])])
    rewriting.fuse(name_of(nodes[-1]), kind, "fastattn activation_dropout")
    rewriting.put(nodes, nodes[-1], drop_in.activation, (node, found.name, dropout_p))


def _put_dropout(rewriting: Rewriting, node: fx.Node) -> None:
    dropout = dropout_of(node)
    if dropout is None or not 0.0 < dropout.p < 1.0:
        return
    size, least = static_size(value_of(node)), _served.LEAST_DROPOUT
    reason = _unsupported(node)
    if reason is None and dropout.in_place:
        reason = "it is in place"
    if reason is None and size is not None and size < least:
        reason = f"{size:,} elements: below {least:,} torch's own is faster"
    if reason is not None:
        return rewriting.leave(node, label(node), reason)
    node.target, node.args, node.kwargs = drop_in.dropout, (dropout.input, dropout.p), {}
    rewriting.taken.add(node)
    rewriting.fuse(name_of(node), "dropout", "fastattn activation_dropout")


def _unsupported(node: fx.Node) -> str | None:
    reason = unsupported("activation_dropout", node)
    if reason is None and value_of(node).device.type != "cpu":
        reason = "the kernel was measured on CPUs alone"
    return reason
