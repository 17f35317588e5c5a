"""Kernels in a graph of torch's functions, as Dynamo captures it.

The graph shows everything that reads a result, which a module cannot know: a linear layer and the
ReLU behind it become one call where nobody else reads what is between. What is put in returns what
it replaces returned, to rounding, and decides at each call, by the size of the problem, whether the
kernel or torch's own code runs.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from fastattn import backends
from fastattn.functional import _served, drop_in
from fastattn.functional._torch_internals import FakeTensor
from fastattn.integrations.report import CompileReport
from fastattn.nn._plain import as_written

_LINEAR = F.linear
_ATTENTION = F.scaled_dot_product_attention
_MULTI_HEAD = F.multi_head_attention_forward
# By which torch's layer runs at inference; a torch without it has no such node in its graphs.
_ENCODER_LAYER = getattr(torch, "_transformer_encoder_layer_fwd", None)
_GETITEM = operator.getitem
_RELUS = (torch.relu, torch.relu_, F.relu, F.relu_)
_ACTIVATIONS = ("celu", "elu", "gelu", "hardswish", "leaky_relu", "mish", "prelu", "relu6", "selu",
                "sigmoid", "silu", "softmax", "softplus", "tanh")  # fmt: skip
_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint

_BY_SIZE = "one kernel call, where the problem is large enough to gain by it"


def with_kernels(gm: fx.GraphModule, report: CompileReport) -> fx.GraphModule:
    """``gm`` with kernels put into its graph; ``report`` is told what was done and what was not.
    ``gm`` stays as it is, and its parameters are shared."""
    gm = _copy(gm)
    graph = gm.graph
    taken: set[fx.Node] = set()
    left: list[tuple[fx.Node, str, str]] = []
    for node in list(graph.nodes):
        if node in taken or node.op not in ("call_function", "call_module"):
            continue
        if node.target is _LINEAR:
            layers = _stretch(node)
            taken.update(x for layer in layers for x in layer.nodes)
            _put_layers(graph, layers, report, left)
        elif node.target is _ATTENTION:
            _put_attention(node, report, left)
        elif node.target is _MULTI_HEAD:
            _put_multi_head(node, report, left)
        elif node.target is _ENCODER_LAYER:
            _put_encoder_layer(node, report, left)
        elif node.target is _CHECKPOINT:
            _put_checkpoint(gm, node, report)
    _report_left(left, report)
    graph.lint()
    gm.recompile()
    return gm


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    return copy


class _Layer:
    """A linear layer of the graph, and the ReLU that alone reads it, or None."""

    def __init__(self, linear: fx.Node) -> None:
        self.linear = linear
        self.input, self.weight, self.bias = _arguments(linear, "input", "weight", "bias")
        self.why_not = _why_not_linear(linear, self.input, self.weight, self.bias)
        self.relu: fx.Node | None = None
        self.without_effect: list[fx.Node] = []  # dropout in evaluation, behind the ReLU
        self.why_no_relu = ""
        if self.why_not is None:
            self._find_relu()

    @property
    def nodes(self) -> list[fx.Node]:
        return [self.linear, *([self.relu] if self.relu else []), *self.without_effect]

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    def _find_relu(self) -> None:
        relus = [user for user in self.linear.users if _is_relu(user, self.linear)]
        if not relus:
            activation = next((_label(u) for u in self.linear.users if _is_activation(u)), None)
            self.why_no_relu = (
                f"no kernel for {activation} behind it" if activation else "no ReLU behind it"
            )
        elif len(self.linear.users) > 1:
            others = ", ".join(_label(u) for u in self.linear.users if u is not relus[0])
            self.why_no_relu = f"{others} reads it as well as the ReLU"
        elif any(map(_may_set_a_mode, _between(self.linear, relus[0]))):
            self.why_no_relu = "the mode (grad, autocast) may change between it and its ReLU"
        else:
            self.relu = relus[0]
            while (after := _only_user(self.last)) is not None and _is_off(after, self.last):
                self.without_effect.append(after)


def _stretch(first: fx.Node) -> list[_Layer]:
    """The layer of ``first`` and those that follow it through ReLUs, next to each other in the
    graph: nothing that runs between them could see, or change, what they read."""
    layers = [_Layer(first)]
    while layers[-1].relu is not None:
        after = _only_user(layers[-1].last)
        if after is None or after.target is not _LINEAR:
            break
        layer = _Layer(after)
        if layer.input is not layers[-1].last or layer.why_not is not None:
            break
        known = {x for each in layers for x in each.nodes}
        if not all(x in known or _is_input(x) for x in _between(first, after)):
            break
        layers.append(layer)
    return layers


def _put_layers(
    graph: fx.Graph, layers: Sequence[_Layer], report: CompileReport, left: list
) -> None:
    relus = sum(layer.relu is not None for layer in layers)
    weights = [_value(layer.weight) for layer in layers if layer.why_not is None]
    if relus and (work := _small_work(_value(layers[0].input), weights)) is not None:
        reason = (
            f"{work:,} multiply-adds in all: below {_served.LEAST_WORK:,} torch's own code is "
            "faster on a CPU"
        )
        left += ((layer.linear, "linear, relu", reason) for layer in layers)
        return
    if relus and relus == len(layers) - 1:
        call = (layers[0].input, [x.weight for x in layers], [x.bias for x in layers])
        with graph.inserting_before(layers[-1].linear):
            fused = graph.call_function(drop_in.mlp, call)
        _replace(graph, fused, [x for layer in layers for x in layer.nodes])
        name = ", ".join(_name(layer.linear) for layer in layers)
        report.add(name, "linear, relu, ..., linear", "fastattn mlp", _BY_SIZE)
        return
    for layer in layers:
        if layer.relu is not None:
            with graph.inserting_before(layer.linear):
                fused = graph.call_function(
                    drop_in.linear_relu, (layer.input, layer.weight, layer.bias)
                )
            _replace(graph, fused, layer.nodes)
            report.add(_name(layer.linear), "linear, relu", "fastattn linear_relu", _BY_SIZE)
        elif layer.why_not is not None:
            left.append((layer.linear, "linear", layer.why_not))
        elif _served.lacks_product(_value(layer.linear).dtype, _value(layer.linear).device):
            layer.linear.target = drop_in.linear
            why = f"torch has no product in {_value(layer.linear).dtype} for this processor"
            report.add(_name(layer.linear), "linear", "fastattn linear", why)
        else:
            left.append((layer.linear, "linear", f"{layer.why_no_relu}: torch's own product"))


def _small_work(input: Tensor, weights: Sequence[Tensor]) -> int | None:
    """The layers' multiply-adds, where their sizes are known now and they are too few."""
    numbers = [input.numel(), input.shape[-1], *(weight.numel() for weight in weights)]
    if not all(isinstance(n, int) for n in numbers) or not numbers[1]:
        return None
    work = sum(numbers[2:])
    small = _served.is_small_product(input, work)
    return input.numel() // input.shape[-1] * work if small else None


def _put_attention(node: fx.Node, report: CompileReport, left: list) -> None:
    query, key, value, mask = _arguments(node, "query", "key", "value", "attn_mask")
    reason = _why_not("attention", node, query, key, value, mask)
    if reason is None:
        node.target = drop_in.scaled_dot_product_attention
        after = "fastattn scaled_dot_product_attention"
        report.add(_name(node), "scaled_dot_product_attention", after, _BY_SIZE)
    else:
        left.append((node, "scaled_dot_product_attention", reason))


def _put_multi_head(node: fx.Node, report: CompileReport, left: list) -> None:
    """multi_head_attention_forward, where nobody reads the attention weights."""
    call = inspect.signature(_MULTI_HEAD).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    given = call.arguments
    reason = _why_not("attention", node, given["query"], given["key"], given["value"])
    if reason is None and not as_written(nn.MultiheadAttention):
        reason = "torch's function is replaced"
    if reason is None and given["need_weights"]:
        if any(user.target is not _GETITEM or (user.args[1] != 0 and user.users)
               for user in node.users):  # fmt: skip
            reason = "its attention weights are read"
        # Without weights torch would trust the hint; with them it reads the mask.
        given["need_weights"] = given["is_causal"] = False
    if reason is not None:
        left.append((node, "multi_head_attention_forward", reason))
        return
    node.target, node.args, node.kwargs = multi_head_attention_forward, call.args, {}
    after = "torch's on fastattn scaled_dot_product_attention"
    report.add(_name(node), "multi_head_attention_forward", after, _BY_SIZE)


_multi_head_on_ours = FunctionType(
    _MULTI_HEAD.__code__,
    {**vars(F), "scaled_dot_product_attention": drop_in.scaled_dot_product_attention},
    argdefs=_MULTI_HEAD.__defaults__,
)


def multi_head_attention_forward(*args: object) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward``, torch's own code and checks, on our
    scaled_dot_product_attention."""
    return _multi_head_on_ours(*args)


def _put_encoder_layer(node: fx.Node, report: CompileReport, left: list) -> None:
    tensors = [x for x in node.args if isinstance(x, fx.Node)]
    reason = _why_not("attention", node, *tensors)
    masked = any(x is not None for x in (*node.args[18:], *node.kwargs.values()))
    if reason is None and masked:
        reason = "it has a mask"
    if reason is not None:
        left.append((node, "transformer_encoder_layer", reason))
        return
    node.target, node.args, node.kwargs = drop_in.transformer_encoder_layer, node.args[:18], {}
    after = "fastattn scaled_dot_product_attention, mlp"
    report.add(_name(node), "transformer_encoder_layer", after, _BY_SIZE)


def _put_checkpoint(gm: fx.GraphModule, node: fx.Node, report: CompileReport) -> None:
    """Activation checkpointing: the operation only marks what a later compiler should recompute,
    and there is none here, so that the checkpoint itself has to run."""
    body = node.args[0]
    if not isinstance(body, fx.Node) or body.op != "get_attr":
        return
    inner = gm.get_submodule(body.target)
    if isinstance(inner, fx.GraphModule):
        gm.set_submodule(body.target, with_kernels(inner, report))
        node.target = _checkpoint


def _checkpoint(body: fx.GraphModule, *args: object, **kwargs: object) -> tuple:
    given, of_body = _CHECKPOINT.divide_kwargs(kwargs)
    context = body.meta.get("_checkpoint_context_fn")
    if context is not None:
        given["context_fn"] = context
    return checkpoint(body, *args, **{"use_reentrant": False, **given}, **of_body)


def _replace(graph: fx.Graph, fused: fx.Node, nodes: Sequence[fx.Node]) -> None:
    fused.meta = dict(nodes[-1].meta)
    nodes[-1].replace_all_uses_with(fused)
    for node in reversed(nodes):
        graph.erase_node(node)


def _why_not_linear(linear: fx.Node, input: object, weight: object, bias: object) -> str | None:
    """Why no kernel may take the layer, or None."""
    reason = _why_not("linear_relu", linear, input, weight, bias)
    if reason is None:
        out_features = _value(weight).shape[:1]
        if _value(weight).dim() != 2 or (bias is not None and _value(bias).shape != out_features):
            reason = "its weight or its bias is broadcast"
    return reason


def _why_not(op: str, node: fx.Node, *operands: object) -> str | None:
    """Why no kernel may take what ``node`` computes of ``operands``, Nones among them, or None."""
    for x in (node, *operands):
        if x is None:
            continue
        value = _value(x)
        values = value if isinstance(value, tuple) else (value,)
        for value in values:
            if value is None:
                continue
            if type(value) is not FakeTensor:
                return f"one of its tensors is of type {type(value).__name__}"
            if value.layout is not torch.strided or value.is_nested:
                return f"one of its tensors has the layout {value.layout}"
    value = _value(node)
    value = value[0] if isinstance(value, tuple) else value
    return backends.why_no_kernel(op, value.device, value.dtype)


def _report_left(left: Sequence[tuple[fx.Node, str, str]], report: CompileReport) -> None:
    """One entry for all nodes of a kind that were left alone for one reason."""
    for (kind, reason), count in Counter((kind, reason) for _, kind, reason in left).items():
        first = next(_name(node) for node, k, r in left if (k, r) == (kind, reason))
        report.add(f"{first} (and {count - 1} more)" if count > 1 else first, kind, None, reason)


def _arguments(node: fx.Node, *names: str) -> tuple[object, ...]:
    """The node's first arguments, by position or by name; None where one is not given."""
    given = (*node.args, *(None,) * (len(names) - len(node.args)))
    return tuple(
        node.kwargs.get(name) if x is None else x for name, x in zip(names, given, strict=False)
    )


def _value(x: object) -> object:
    """What a node was when the graph was captured: a fake tensor, where it is a tensor."""
    return x.meta.get("example_value") if isinstance(x, fx.Node) else x


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _may_set_a_mode(node: fx.Node) -> bool:
    """Whether the node may do something else than compute tensors."""
    value = _value(node)
    values = value if isinstance(value, tuple | list) else (value,)
    return not _is_input(node) and not all(isinstance(x, Tensor) for x in values)


def _is_input(node: fx.Node) -> bool:
    """Whether the node is an input of the graph, or a number read from one."""
    if node.op == "call_method" and node.target in ("item", "size"):
        node = node.args[0]
    return node.op in ("placeholder", "get_attr")


def _is_relu(node: fx.Node, operand: fx.Node) -> bool:
    if not node.args or node.args[0] is not operand:
        return False
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in _RELUS


def _is_activation(node: fx.Node) -> bool:
    return _label(node).rstrip("_") in _ACTIVATIONS


def _is_off(node: fx.Node, operand: fx.Node) -> bool:
    """Whether the node is dropout that drops nothing, and returns its operand."""
    if node.target is not F.dropout or not node.args or node.args[0] is not operand:
        return False
    call = inspect.signature(F.dropout).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    return call.arguments["training"] is False


def _label(node: fx.Node) -> str:
    if node.op == "output":
        return "the caller"
    return str(getattr(node.target, "__name__", node.target))


def _name(node: fx.Node) -> str:
    """The module that makes the call, or the line of code."""
    stack = node.meta.get("nn_module_stack") or {"": ("", nn.Module)}
    path, kind = next(reversed(stack.values()))
    path = re.sub(r"^[LG]\['(\w+)'\]", r"\1", path)
    path = re.sub(r"\._modules\['(\w+)'\]", r".\1", path)
    path = re.sub(r"^(self|fn)(\.|$)", "", path)
    if path and (node.target is not _LINEAR or issubclass(kind, nn.Linear)):
        return path
    places = re.findall(r'File "(.*)", line (\d+), in (.+)', node.meta.get("stack_trace") or "")
    if not places:
        return node.name
    file, line, function = places[-1]
    return f"{file.replace(chr(92), '/').rpartition('/')[2]}:{line} ({function})"
