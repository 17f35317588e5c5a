"""Linear layers and their ReLUs in a graph: one call where nobody else reads what is between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fastattn import _products
from fastattn.functional import _served, drop_in
from fastattn.integrations.graph.nodes import (
    LINEAR,
    Rewriting,
    arguments,
    between,
    is_activation,
    is_input,
    is_off,
    is_relu,
    label,
    may_set_a_mode,
    name_of,
    only_user,
    unsupported,
    value_of,
)


def put_layers(rewriting: Rewriting, first: fx.Node) -> None:
    """Fuses the layer of ``first`` and those that follow it, or says why not."""
    layers = _stretch(first)
    rewriting.taken.update(x for layer in layers for x in layer.nodes)
    relus = sum(layer.relu is not None for layer in layers)
    weights = [value_of(layer.weight) for layer in layers if layer.unsupported is None]
    if relus and (work := _small_work(value_of(layers[0].input), weights)) is not None:
        for layer in layers:
            rewriting.leave(
                layer.linear,
                "linear, relu",
                f"{work:,} multiply-adds in all: below {_served.LEAST_WORK:,} torch's own code is "
                "faster on a CPU",
            )
    elif relus and relus == len(layers) - 1:
        call: tuple[Any, ...] = (
            layers[0].input,
            [x.weight for x in layers],
            [x.bias for x in layers],
        )
        name = ", ".join(name_of(layer.linear) for layer in layers)
        with rewriting.graph.inserting_before(layers[-1].linear):
            fused = rewriting.graph.call_function(drop_in.mlp, call)
        rewriting.replace([x for layer in layers for x in layer.nodes], fused)
        rewriting.fuse(name, "linear, relu, ..., linear", "fastattn mlp")
    else:
        for layer in layers:
            _put_layer(rewriting, layer)


def _put_layer(rewriting: Rewriting, layer: _Layer) -> None:
    linear, name = layer.linear, name_of(layer.linear)
    if layer.relu is not None:
        with rewriting.graph.inserting_before(linear):
            call: tuple[Any, ...] = (layer.input, layer.weight, layer.bias)
            fused = rewriting.graph.call_function(drop_in.linear_relu, call)
        rewriting.replace(layer.nodes, fused)
        rewriting.fuse(name, "linear, relu", "fastattn linear_relu")
    elif layer.unsupported is not None:
        rewriting.leave(linear, "linear", layer.unsupported)
    elif (why := _why_kernels(linear, layer.weight)) is not None:
        linear.target = drop_in.linear
        rewriting.fuse(name, "linear", "fastattn linear", why)
    else:
        rewriting.leave(linear, "linear", f"{layer.why_no_relu}: torch's own product")


class _Layer:
    """A linear layer of the graph, and the ReLU that alone reads it, or None."""

    def __init__(self, linear: fx.Node) -> None:
        self.linear = linear
        self.input, self.weight, self.bias = arguments(linear, "input", "weight", "bias")
        self.unsupported = _unsupported_linear(linear, self.input, self.weight, self.bias)
        self.relu: fx.Node | None = None
        self.without_effect: list[fx.Node] = []  # dropout in evaluation, behind the ReLU
        self.why_no_relu = ""
        if self.unsupported is None:
            self._find_relu()

    @property
    def nodes(self) -> list[fx.Node]:
        return [self.linear, *([self.relu] if self.relu else []), *self.without_effect]

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    def _find_relu(self) -> None:
        relus = [user for user in self.linear.users if is_relu(user, self.linear)]
        if not relus:
            activation = next((label(u) for u in self.linear.users if is_activation(u)), None)
            self.why_no_relu = (
                f"no kernel for {activation} after it" if activation else "no ReLU after it"
            )
        elif len(self.linear.users) > 1:
            others = ", ".join(label(u) for u in self.linear.users if u is not relus[0])
            self.why_no_relu = f"{others} reads it as well as the ReLU"
        elif any(map(may_set_a_mode, between(self.linear, relus[0]))):
            self.why_no_relu = "the mode (grad, autocast) may change between it and its ReLU"
        else:
            self.relu = relus[0]
            while (after := only_user(self.last)) is not None and is_off(after, self.last):
                self.without_effect.append(after)


def _stretch(first: fx.Node) -> list[_Layer]:
    """The layer of ``first`` and those that follow it through ReLUs, next to each other in the
    graph: nothing that runs between them could see, or change, what they read."""
    layers = [_Layer(first)]
    while layers[-1].relu is not None:
        after = only_user(layers[-1].last)
        if after is None or after.target is not LINEAR:
            break
        layer = _Layer(after)
        if layer.input is not layers[-1].last or layer.unsupported is not None:
            break
        known = {x for each in layers for x in each.nodes}
        if not all(x in known or is_input(x) for x in between(first, after)):
            break
        layers.append(layer)
    return layers


def _why_kernels(linear: fx.Node, weight: Any) -> str | None:
    """Why the kernels may multiply faster than torch, at some number of rows."""
    n_out, n_in = value_of(weight).shape
    computed = value_of(linear)
    return _products.why_swap(n_out, n_in, computed.dtype, computed.device)


def _small_work(input: Tensor, weights: Sequence[Tensor]) -> int | None:
    """The layers' multiply-adds, where their sizes are known now and they are too few."""
    numbers = [input.numel(), input.shape[-1], *(weight.numel() for weight in weights)]
    if not all(isinstance(n, int) for n in numbers) or not numbers[1]:
        return None
    work = sum(numbers[2:])
    small = _served.is_small_product(input, work)
    return input.numel() // input.shape[-1] * work if small else None


def _unsupported_linear(linear: fx.Node, input: object, weight: object, bias: object) -> str | None:
    """Why no kernel may take the layer, or None."""
    reason = unsupported("linear_relu", linear, input, weight, bias)
    if reason is None:
        shape = value_of(weight).shape
        if len(shape) != 2 or (bias is not None and value_of(bias).shape != shape[:1]):
            reason = "its weight or its bias is broadcast"
    return reason
