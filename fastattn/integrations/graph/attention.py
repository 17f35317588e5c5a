"""Attention in a graph: torch's own functions, and softmax(QKᵀ/√d)V written out."""

from __future__ import annotations

import inspect
import math
import operator
from dataclasses import dataclass, field
from numbers import Real
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastattn._products import lacks_product
from fastattn.functional import _served, drop_in
from fastattn.integrations.graph.nodes import (
    ADDS,
    FACTORS,
    GETITEM,
    Rewriting,
    arguments,
    between,
    is_pure,
    is_target,
    name_of,
    unsupported,
    value_of,
)
from fastattn.nn._plain import as_written

_MULTI_HEAD = F.multi_head_attention_forward
_SDPA = "scaled_dot_product_attention"


def put_attention(rewriting: Rewriting, node: fx.Node) -> None:
    """Attention by one of torch's functions, or written out."""
    if node.op == "call_function" and node.target in _PUT:
        _PUT[node.target](rewriting, node)
    else:
        put_written_attention(rewriting, node)


def put_sdpa(rewriting: Rewriting, node: fx.Node) -> None:
    reason = unsupported("attention", node, *arguments(node, "query", "key", "value", "attn_mask"))
    if reason is None and _is_small(node):
        reason = "it is small: torch's own is faster without gradients"
    if reason is not None:
        return rewriting.leave(node, _SDPA, reason)
    rewriting.fuse(name_of(node), _SDPA, f"fastattn {_SDPA}")
    node.target = drop_in.scaled_dot_product_attention


def _is_small(node: fx.Node) -> bool:
    """Whether it is known now that torch's attention will be faster at every call."""
    given = arguments(node, "query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    query, key, value = (value_of(x) for x in given[:3])
    sizes = [size for x in (query, key, value) for size in x.shape]
    if value_of(node).requires_grad or not all(isinstance(size, int) for size in sizes):
        return False
    if given[4] not in (None, 0.0) or (given[3] is not None and given[5]):
        return False
    lacking = lacks_product(value_of(node).dtype, query.device)
    return query.is_cpu and not lacking and _served.has_few_products(query, key, value)


def put_multi_head(rewriting: Rewriting, node: fx.Node) -> None:
    """multi_head_attention_forward, where nobody reads the attention weights."""
    call = inspect.signature(_MULTI_HEAD).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    given = call.arguments
    reason = unsupported("attention", node, given["query"], given["key"], given["value"])
    if reason is None and not as_written(nn.MultiheadAttention):
        reason = "torch's function is replaced"
    if reason is None and given["need_weights"]:
        if any(user.target is not GETITEM or (user.args[1] != 0 and user.users)
               for user in node.users):  # fmt: skip
            reason = "its attention weights are read"
        # Without weights torch would trust the hint; with them it reads the mask.
        given["need_weights"] = given["is_causal"] = False
    if reason is not None:
        return rewriting.leave(node, "multi_head_attention_forward", reason)
    after = f"torch's on fastattn {_SDPA}"
    rewriting.fuse(name_of(node), "multi_head_attention_forward", after)
    node.target, node.args, node.kwargs = multi_head_attention_forward, call.args, {}


_multi_head_on_ours = FunctionType(
    _MULTI_HEAD.__code__,
    {**vars(F), _SDPA: drop_in.scaled_dot_product_attention},
    argdefs=_MULTI_HEAD.__defaults__,
)


def multi_head_attention_forward(*args: object) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward``, torch's own code and checks, on our
    scaled_dot_product_attention."""
    return _multi_head_on_ours(*args)


def put_encoder_layer(rewriting: Rewriting, node: fx.Node) -> None:
    reason = unsupported("attention", node, *(x for x in node.args if isinstance(x, fx.Node)))
    if reason is None and any(x is not None for x in (*node.args[18:], *node.kwargs.values())):
        reason = "it has a mask"
    if reason is not None:
        return rewriting.leave(node, "transformer_encoder_layer", reason)
    rewriting.fuse(name_of(node), "transformer_encoder_layer", f"fastattn {_SDPA}, mlp")
    node.target, node.args, node.kwargs = drop_in.transformer_encoder_layer, node.args[:18], {}


_PUT = {
    F.scaled_dot_product_attention: put_sdpa,
    _MULTI_HEAD: put_multi_head,
    # torch's layer calls it at inference; a torch without it has no such node in its graphs.
    getattr(torch, "_transformer_encoder_layer_fwd", None): put_encoder_layer,
}

_MATMULS = (torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__")
_SOFTMAXES = (F.softmax, torch.softmax, "softmax")
_DIVISORS = (operator.truediv, torch.div, "div", "__truediv__")
_FILLS = (torch.masked_fill, "masked_fill")


@dataclass
class _Written:
    """Attention written out, read from the last product backwards."""

    out: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)  # last first
    value: Any = None  # fx.Node, as these
    dropout_p: object = 0.0
    softmax_dtype: torch.dtype | None = None
    mask: fx.Node | None = None
    fill: float | None = None  # of the scores where the mask is True; None: the mask is added
    scale: float = 1.0
    query: Any = None
    key_transposed: Any = None

    def read(self) -> bool:
        """Whether it is softmax(scale · QKᵀ + mask) V, with dropout or without."""
        self.nodes, (probs, self.value) = [self.out], _operands(self.out)
        node = self._cast(self._dropout(probs))
        node = self._scaled(self._masked(self._softmax(node)))
        if node is None or not is_target(node, _MATMULS):
            return False
        self.nodes.append(node)
        self.query, self.key_transposed = _operands(node)
        return isinstance(self.query, fx.Node) and isinstance(self.key_transposed, fx.Node)

    def _dropout(self, node: Any) -> Any:
        if not isinstance(node, fx.Node) or node.target is not F.dropout:
            return node
        x, p, training = arguments(node, "input", "p", "training")
        if training is not False:
            self.dropout_p = 0.5 if p is None else p
        self.nodes.append(node)
        return x

    def _cast(self, node: Any) -> Any:
        if is_target(node, ("to",)) and len(node.args) == 2 and not node.kwargs:
            self.nodes.append(node)
            return node.args[0]
        return node

    def _softmax(self, node: Any) -> Any:
        if not is_target(node, _SOFTMAXES):
            return None
        x, dim = arguments(node, "input", "dim")
        scores = value_of(node)
        if not isinstance(scores, Tensor) or dim not in (-1, scores.dim() - 1):
            return None
        self.softmax_dtype = node.kwargs.get("dtype")
        self.nodes.append(node)
        return x

    def _masked(self, node: Any) -> Any:
        if is_target(node, _FILLS):
            x, mask, fill = arguments(node, "input", "mask", "value")
            if not isinstance(mask, fx.Node) or not isinstance(fill, Real):
                return None
            self.mask, self.fill = mask, float(fill)
            self.nodes.append(node)
            return x
        if is_target(node, ADDS) and len(node.args) == 2 and not node.kwargs:
            for x, mask in (node.args, node.args[::-1]):
                if is_target(x, (*_MATMULS, *FACTORS, *_DIVISORS)) and isinstance(mask, fx.Node):
                    self.mask = mask
                    self.nodes.append(node)
                    return x
        return node

    def _scaled(self, node: Any) -> Any:
        if not is_target(node, (*FACTORS, *_DIVISORS)) or len(node.args) != 2 or node.kwargs:
            return node
        x, number = node.args
        if is_target(node, FACTORS) and isinstance(x, Real):
            x, number = number, x
        if not isinstance(x, fx.Node) or not isinstance(number, Real) or not number:
            return None
        self.scale = float(number) if is_target(node, FACTORS) else 1.0 / float(number)
        if not math.isfinite(self.scale):
            return None
        self.nodes.append(node)
        return x

    def unsupported(self) -> str | None:
        """Why no kernel may take it."""
        if any(len(node.users) > 1 for node in self.nodes[1:]):
            return "its scores or its attention weights are read"
        known = set(self.nodes)
        if not all(x in known or is_pure(x) for x in between(self.nodes[-1], self.out)):
            return "something else may run between its two products"
        reason = unsupported("attention", self.out, self.query, self.key_transposed, self.value)
        if reason is None and self.mask is not None:
            mask, query = value_of(self.mask), value_of(self.query)
            if not isinstance(mask, Tensor):
                reason = "its mask is not a tensor"
            elif mask.dtype is not (query.dtype if self.fill is None else torch.bool):
                reason = f"its mask is {mask.dtype} beside {query.dtype}"
            elif mask.device.type != "cpu":
                reason = "whether a row is masked whole is looked up on CPUs alone"
        return reason


def put_written_attention(rewriting: Rewriting, node: fx.Node) -> None:
    """softmax(QKᵀ/√d)V of a forward's own code, where nobody reads the scores or the weights."""
    if not is_target(node, _MATMULS):
        return
    written = _Written(node)
    if not written.read():
        return
    reason = written.unsupported()
    if reason is not None:
        return rewriting.leave(node, "softmax(QKᵀ)V", reason)
    name = name_of(node)
    call: tuple[Any, ...] = (
        written.query, written.key_transposed, written.value, written.scale, written.mask,
        written.fill, written.dropout_p, written.softmax_dtype,
    )  # fmt: skip
    with rewriting.graph.inserting_before(node):
        fused = rewriting.graph.call_function(drop_in.written_attention, call)
    rewriting.replace(written.nodes[::-1], fused)
    rewriting.fuse(name, "softmax(QKᵀ)V", f"fastattn {_SDPA}")


def _operands(product: fx.Node) -> tuple[object, object]:
    one, other = arguments(product, "input", "other")
    return one, product.kwargs.get("mat2", other)
