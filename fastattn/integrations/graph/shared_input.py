"""Several linear layers on one input in a graph: gated MLPs, and query, key and value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fastattn.functional import _served, drop_in, inference
from fastattn.integrations.graph.activations import find_activation
from fastattn.integrations.graph.layers import Layer, decided, static_work, why_kernels
from fastattn.integrations.graph.nodes import (
    FACTORS,
    GETITEM,
    LINEAR,
    Rewriting,
    arguments,
    is_input,
    is_target,
    name_of,
    only_pure_between,
    only_user,
    value_of,
)


def put_gated(rewriting: Rewriting, node: fx.Node) -> None:
    """activation(linear(x)) * linear(x) as one call."""
    if not is_target(node, FACTORS) or len(node.args) != 2 or node.kwargs:
        return
    for activated, up in (node.args, node.args[::-1]):
        if isinstance(activated, fx.Node) and isinstance(up, fx.Node):
            nodes, name = _gate(node, activated, up)
            if nodes and _put_gate(rewriting, nodes, up, name):
                return


def _gate(product: fx.Node, activated: fx.Node, up: fx.Node) -> tuple[list[fx.Node], str]:
    """The nodes of the gate, its Linear first, and its activation; none where ``product`` is not
    gated."""
    if up.target is LINEAR and only_user(up) is only_user(activated) is product:
        for gate in _linears_on(arguments(up, "input")[0]):
            found = find_activation(gate) if gate is not up else None
            if found is not None and not found.others and found.nodes[-1] is activated:
                return [gate, *found.nodes, product], found.name
    return [], ""


def _put_gate(rewriting: Rewriting, nodes: list[fx.Node], up: fx.Node, name: str) -> bool:
    gate, of_up = Layer(nodes[0]), Layer(up)
    if gate.unsupported is not None or of_up.unsupported is not None:
        return False
    weights = [value_of(gate.weight), value_of(of_up.weight)]
    nodes = sorted((up, *nodes))
    if weights[0].shape != weights[1].shape or not only_pure_between(nodes):
        return False
    input = value_of(gate.input)
    if static_work(input, weights) is not None and not _served.fuses(input, weights[0], name):
        return False  # each layer is looked at by itself
    call = (gate.input, gate.weight, of_up.weight, gate.bias, of_up.bias, name)
    names = f"{name_of(gate.linear)}, {name_of(up)}"
    rewriting.put(nodes, nodes[-1], drop_in.gated_linear, call)
    rewriting.fuse(names, f"linear, {name}, times linear", "fastattn gated_mlp")
    return True


def put_shared(rewriting: Rewriting, node: fx.Node) -> None:
    """Linear layers that read ``node``, with nothing of their own behind them, as one call. The
    losses of several heads may go backward one by one where nothing before them has a gradient, as
    behind a frozen model: these stay apart."""
    linears = _linears_on(node)
    frozen = is_input(node) or not linears or not value_of(node).requires_grad
    if frozen and any(value_of(linear).requires_grad for linear in linears):
        return
    waiting = [linear for linear in linears if linear not in rewriting.taken]
    while len(waiting) > 1:
        layers = _together([Layer(linear) for linear in waiting])
        if len(layers) > 1:
            _put_together(rewriting, layers)
        waiting = [x for x in waiting[1:] if x not in rewriting.taken]


def _together(layers: Sequence[Layer]) -> list[Layer]:
    """The first layer and those that can be computed with it, at its place."""
    first = layers[0].linear
    return [
        layer
        for layer in layers
        if layer.unsupported is None
        and not layer.followers
        and why_kernels(layer.linear, layer.weight) is not None
        and only_pure_between([first, layer.linear])
        and all(x < first for x in layer.linear.all_input_nodes)
    ]


def _put_together(rewriting: Rewriting, layers: Sequence[Layer]) -> None:
    input, weights = value_of(layers[0].input), [value_of(layer.weight) for layer in layers]
    if static_work(input, weights) is not None and not _served.product_wins(input, *weights):
        return
    first = layers[0].linear
    name = ", ".join(name_of(layer.linear) for layer in layers)
    call: tuple[Any, ...] = (
        layers[0].input,
        [layer.weight for layer in layers],
        [layer.bias for layer in layers],
    )
    function: Any = inference.multi_linear if decided(layers) else drop_in.multi_linear
    with rewriting.graph.inserting_before(first):
        together = rewriting.graph.call_function(function, call)
        items = [rewriting.graph.call_function(GETITEM, (together, i)) for i in range(len(layers))]
    together.meta["example_value"] = tuple(value_of(layer.linear) for layer in layers)
    rewriting.fuse(name, "linears on one input", "fastattn multi_linear")
    for layer, item in zip(layers, items, strict=True):
        rewriting.replace([layer.linear], item)


def _linears_on(x: Any) -> list[fx.Node]:
    """The linear layers whose input is ``x``, in the graph's order."""
    users = x.users if isinstance(x, fx.Node) else ()
    return sorted(
        user for user in users if user.target is LINEAR and arguments(user, "input")[0] is x
    )
