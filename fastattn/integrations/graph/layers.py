"""Linear layers in a graph with what follows each: its activation and its dropout. One call where
nobody else reads what is between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fastattn import _products, backends
from fastattn.functional import _served, drop_in, inference
from fastattn.integrations.graph.activations import NAMES, find_activation
from fastattn.integrations.graph.nodes import (
    LINEAR,
    Rewriting,
    active_dropout_after,
    arguments,
    between,
    is_input,
    label,
    modes_between,
    name_of,
    only_user,
    unsupported,
    value_of,
)


def put_layers(rewriting: Rewriting, first: fx.Node) -> None:
    """Fuses the layer of ``first`` and those that follow it, or says why not."""
    if first.target is not LINEAR:
        return
    layers = _stretch(first)
    rewriting.taken.update(x for layer in layers for x in layer.nodes)
    if len(layers) == 1:
        return _put_layer(rewriting, layers[0])
    if layers[-1].activation is not None or layers[-1].dropout_p:
        for layer in layers:
            _put_layer(rewriting, layer)
    elif (reason := _why_torchs(layers)) is not None:
        for layer in layers:
            rewriting.leave(layer.linear, "linear, relu", reason)
    else:
        call = (layers[0].input, [x.weight for x in layers], [x.bias for x in layers])
        name = ", ".join(name_of(layer.linear) for layer in layers)
        nodes = [x for layer in layers for x in layer.nodes]
        rewriting.put(nodes, layers[-1].linear, drop_in.mlp, call)
        rewriting.fuse(name, "linear, relu, ..., linear", "fastattn mlp")


def _put_layer(rewriting: Rewriting, layer: Layer) -> None:
    linear = layer.linear
    call = layer.operands
    kind = ", ".join(["linear", *([layer.activation] if layer.activation else []),
                      *(["dropout"] if layer.dropout_p else [])])  # fmt: skip
    if layer.unsupported is not None:
        rewriting.leave(linear, "linear", layer.unsupported)
    elif layer.activation is None and not layer.dropout_p:
        _put_product(rewriting, layer)
    elif (reason := _why_torchs([layer])) is not None:
        rewriting.leave(linear, kind, reason)
        rewriting.taken.difference_update(layer.followers)
    elif kind == "linear, relu":
        rewriting.put(layer.nodes, linear, drop_in.linear_relu, call)
        rewriting.fuse(name_of(linear), kind, "fastattn linear_relu")
    else:
        name = name_of(linear)
        call = (*call, layer.activation, layer.dropout_p)
        known = decided([layer]) and layer.dropout_p == 0.0
        function = inference.linear_activation if known else drop_in.linear_activation
        rewriting.put(layer.nodes, linear, function, call)
        rewriting.fuse(name, kind, "fastattn linear")


def _put_product(rewriting: Rewriting, layer: Layer) -> None:
    linear = layer.linear
    work = static_work(value_of(layer.input), [value_of(layer.weight)])
    if (why := why_kernels(linear, layer.weight)) is not None:
        if work is not None and not _served.product_wins(
            value_of(layer.input), value_of(layer.weight)
        ):
            return rewriting.leave(
                linear, "linear", f"torch's product of {work:,} multiply-adds is as fast"
            )
        linear.target = inference.linear if decided([layer]) else drop_in.linear
        rewriting.fuse(name_of(linear), "linear", "fastattn linear", why)
    else:
        rewriting.leave(linear, "linear", f"{layer.why_alone}: torch's own product")


class Layer:
    """A linear layer of the graph, and what follows it and is nobody else's."""

    def __init__(self, linear: fx.Node) -> None:
        self.linear = linear
        self.unsupported = _unsupported_linear(linear, *self.operands)
        self.activation: str | None = None
        self.dropout_p = 0.0
        self.followers: list[fx.Node] = []  # activation and dropout
        self.why_alone = ""
        if self.unsupported is None:
            self._find_activation()
            self._find_dropout()

    @property
    def operands(self) -> tuple[Any, ...]:
        """Input, weight and bias, which may have been replaced since the layer was found."""
        return arguments(self.linear, "input", "weight", "bias")

    @property
    def input(self) -> Any:
        return self.operands[0]

    @property
    def weight(self) -> Any:
        return self.operands[1]

    @property
    def bias(self) -> Any:
        return self.operands[2]

    @property
    def nodes(self) -> list[fx.Node]:
        return [self.linear, *self.followers]

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    def _find_activation(self) -> None:
        found = find_activation(self.linear)
        if found is None:
            self.why_alone = "no activation with a kernel after it"
        elif found.others:
            others = ", ".join(dict.fromkeys(label(user) for user in found.others))
            self.why_alone = f"{others} reads it as well as the {NAMES[found.name]}"
        elif modes_between(self.linear, found.nodes[-1]):
            self.why_alone = (
                f"the mode (grad, autocast) may change between it and its {NAMES[found.name]}"
            )
        else:
            self.activation = found.name
            self.followers += found.nodes

    def _find_dropout(self) -> None:
        self.dropout_p, dropout = active_dropout_after(self.last)
        self.followers += dropout


def _stretch(first: fx.Node) -> list[Layer]:
    """The layer of ``first`` and those that follow it through ReLUs, next to each other in the
    graph: nothing that runs between them could see, or change, what they read."""
    layers = [Layer(first)]
    while layers[-1].activation == "relu" and not layers[-1].dropout_p:
        after = only_user(layers[-1].last)
        if after is None or after.target is not LINEAR:
            break
        layer = Layer(after)
        if layer.input is not layers[-1].last or layer.unsupported is not None:
            break
        known = {x for each in layers for x in each.nodes}
        if not all(x in known or is_input(x) for x in between(first, after)):
            break
        layers.append(layer)
    return layers


def why_kernels(linear: fx.Node, weight: Any) -> str | None:
    """Why the kernels may multiply faster than torch, at some number of rows."""
    n_out, n_in = value_of(weight).shape
    computed = value_of(linear)
    return _products.why_swap(n_out, n_in, computed.dtype, computed.device)


def _why_torchs(layers: Sequence[Layer]) -> str | None:
    """Why torch's own code is faster for the layers, where their sizes are known now."""
    input, layer = value_of(layers[0].input), layers[0]
    weights = [value_of(each.weight) for each in layers]
    work = static_work(input, weights)
    if work is None:
        return None
    small = _served.is_small_product(input, sum(w.numel() for w in weights))
    if len(layers) == 1:
        if _served.fuses(input, weights[0], layer.activation, layer.dropout_p):
            return None
        if layer.activation is not None and not small:
            return f"torch's product and {layer.activation} are as fast in {input.dtype}"
    elif not small:
        return None
    return (
        f"{work:,} multiply-adds in all: below {_served.least_work(input.dtype):,} torch's own "
        "code is faster on a CPU"
    )


def decided(layers: Sequence[Layer]) -> bool:
    """Whether it is known now that the kernels take the layers, and without gradients: their sizes
    are numbers, and all tensors have one dtype and are computed in it."""
    tensors = [
        value_of(x)
        for layer in layers
        for x in (layer.linear, layer.input, layer.weight, layer.bias)
        if x is not None
    ]
    weights = [value_of(layer.weight) for layer in layers]
    return (
        static_work(value_of(layers[0].input), weights) is not None
        and len({x.dtype for x in tensors}) == 1
        and not any(value_of(layer.last).requires_grad for layer in layers)
        and tensors[0].device.type == "cpu"
        and not backends.named(None)
        and not _products.torch_multiplies(value_of(layers[0].input))
    )


def static_work(input: Tensor, weights: Sequence[Tensor]) -> int | None:
    """The multiply-adds of products with one input, or None where a size is not known now."""
    numbers = [input.numel(), input.shape[-1], *(weight.numel() for weight in weights)]
    if not all(isinstance(n, int) for n in numbers) or not numbers[1]:
        return None
    return input.numel() // input.shape[-1] * sum(numbers[2:])


def _unsupported_linear(linear: fx.Node, input: object, weight: object, bias: object) -> str | None:
    """Why no kernel may take the layer, or None."""
    reason = unsupported("linear_relu", linear, input, weight, bias)
    if reason is None:
        shape = value_of(weight).shape
        if len(shape) != 2 or (bias is not None and value_of(bias).shape != shape[:1]):
            reason = "its weight or its bias is broadcast"
    return reason
