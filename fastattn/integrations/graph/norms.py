"""Norms in a graph, with the sum and the dropout in front of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastattn.functional import _served, drop_in
from fastattn.integrations.graph.nodes import (
    ADDS,
    FACTORS,
    GETITEM,
    IN_PLACE_ADD,
    POWERS,
    Rewriting,
    arguments,
    dropout_of,
    is_target,
    name_of,
    only_pure_between,
    only_user,
    static_size,
    unsupported,
    value_of,
)


@dataclass
class _Norm:
    """A norm of the rows of ``input``, and the sum and dropout before it.

    ``input`` is ``residual`` + dropout(``input``) where there is a sum, whose node is ``total``.
    """

    kind: str  # of drop_in.dropout_add_norm
    input: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: Any  # a number, or a node that is one at the call
    nodes: list[fx.Node] = field(default_factory=list)
    residual: fx.Node | None = None
    dropout_p: float = 0.0
    total: fx.Node | None = None

    @property
    def last(self) -> fx.Node:
        return max(self.nodes)

    @property
    def reads_sum(self) -> list[fx.Node]:
        """Who else reads the sum."""
        users = self.total.users if self.total is not None else ()
        return [user for user in users if user not in self.nodes]

    @property
    def call(self) -> tuple[Any, ...]:
        tensors = (self.input, self.residual, self.weight, self.bias)
        return (*tensors, self.dropout_p, self.eps, self.kind)

    def __str__(self) -> str:
        parts = (
            "dropout" if self.dropout_p else "",
            "sum" if self.total is not None else "",
            {"layer": "layer_norm", "rms": "RMSNorm written out"}.get(self.kind, "rms_norm"),
        )
        return ", ".join(part for part in parts if part)


def put_norm(rewriting: Rewriting, node: fx.Node) -> None:
    """Dropout, sum and norm as one call where the norm is ``node``, or is written out and ``node``
    divides by the root."""
    norm = _called_norm(node) or _written_rms(node)
    if norm is None or not only_pure_between(norm.nodes):
        return
    norm = _with_sum(norm)
    if not _gains(norm):
        return
    reason = _unsupported(norm)
    if reason is not None:
        return rewriting.leave(norm.last, str(norm), reason)
    rewriting.fuse(name_of(norm.last), str(norm), "fastattn dropout_add_norm")
    _put(rewriting, norm)


def _put(rewriting: Rewriting, norm: _Norm) -> None:
    nodes, last = sorted(norm.nodes), norm.last
    if not norm.reads_sum:
        rewriting.put(nodes, last, drop_in.dropout_add_norm, norm.call)
        return
    total = norm.total
    assert total is not None
    with rewriting.graph.inserting_before(last):
        both = rewriting.graph.call_function(drop_in.dropout_add_prenorm, norm.call)
        out, summed = (rewriting.graph.call_function(GETITEM, (both, i)) for i in (0, 1))
    both.meta["example_value"] = (value_of(last), value_of(total))
    summed.meta = dict(total.meta)
    total.replace_all_uses_with(summed, delete_user_cb=lambda user: user not in nodes)
    rewriting.replace(nodes, out)


def _gains(norm: _Norm) -> bool:
    """Whether the kernel may be faster at some size; sizes that are known now count."""
    value = value_of(norm.last)
    if not isinstance(value, Tensor) or (norm.kind == "layer" and norm.total is None):
        return False
    if norm.dropout_p == 0.0 and norm.kind == "layer" and value.requires_grad:
        return False  # torch's backward of a sum and a norm is as fast
    size = static_size(value)
    return size is None or size >= _served.least_norm(norm.kind, norm.dropout_p)


def _unsupported(norm: _Norm) -> str | None:
    operands = (norm.input, norm.residual, norm.weight, norm.bias)
    reason = unsupported("dropout_add_norm", norm.last, *operands)
    if reason is None and value_of(norm.last).device.type != "cpu":
        reason = "norms of the kernels were measured on CPUs alone"
    return reason


# --- norms ----------------------------------------------------------------------------------------


def _called_norm(node: fx.Node) -> _Norm | None:
    """``F.layer_norm`` or ``F.rms_norm`` over the last dimension."""
    if node.op != "call_function" or not is_target(
        node, (F.layer_norm, F.rms_norm, torch.rms_norm)
    ):
        return None
    kind = "layer" if node.target is F.layer_norm else "rms_norm"
    names = ["input", "normalized_shape", "weight", "bias", "eps"]
    if kind != "layer":
        names.remove("bias")
    given = dict(zip(names, arguments(node, *names), strict=True))
    input, weight, bias = given["input"], given["weight"], given.get("bias")
    eps = 1e-5 if given["eps"] is None and kind == "layer" else given["eps"]
    if not isinstance(input, fx.Node) or not _is_number(eps):
        return None
    shape = given["normalized_shape"]
    if not isinstance(shape, tuple | list) or len(shape) != 1:
        return None
    if not all(x is None or isinstance(x, fx.Node) for x in (weight, bias)):
        return None
    return _Norm(kind, input, weight, bias, eps, [node])


def _written_rms(scaled: fx.Node) -> _Norm | None:
    """x · rsqrt(mean(x²) + eps) as the Llama family writes it, and the weight where that comes
    next. In float32 and float64 alone: the written code of 16 bits computes this part in float32,
    and rounds before the weight."""
    for x, root in _operands(scaled, FACTORS):
        nodes = [scaled]
        if (shifted := _read(root, nodes, (torch.rsqrt, "rsqrt"))) is None:
            continue
        for mean, eps in _operands(shifted, ADDS):
            nodes = [scaled, root, shifted]
            squares = _mean_of_rows(mean, nodes)
            if squares is not None and _squared(squares, nodes) is x and _is_number(eps):
                return _with_weight(_Norm("rms", x, None, None, eps, nodes))
    return None


def _is_number(x: object) -> bool:
    """Dynamic shapes make a number of the model's a number that is read from an input."""
    return isinstance(value_of(x), Real | torch.SymFloat)


def _read(node: Any, nodes: list[fx.Node], targets: tuple[Any, ...]) -> Any:
    """The operand of a node of one argument that nobody else reads."""
    if not is_target(node, targets) or len(node.users) != 1 or node.kwargs or len(node.args) != 1:
        return None
    nodes.append(node)
    return node.args[0]


def _mean_of_rows(node: Any, nodes: list[fx.Node]) -> Any:
    if not is_target(node, (torch.mean, "mean")) or len(node.users) != 1:
        return None
    x, dim, keepdim = arguments(node, "input", "dim", "keepdim")
    last = value_of(node).dim() - 1
    if keepdim is not True or dim not in (-1, last, (-1,), [-1]) or "dtype" in node.kwargs:
        return None
    nodes.append(node)
    return x


def _squared(node: Any, nodes: list[fx.Node]) -> Any:
    """x, where the node is x² for the mean alone."""
    if not isinstance(node, fx.Node) or len(node.users) != 1 or node.kwargs:
        return None
    nodes.append(node)
    if is_target(node, POWERS):
        return node.args[0] if node.args[1] == 2 else None
    if is_target(node, (torch.square, "square")):
        return node.args[0]
    same = is_target(node, FACTORS) and node.args[0] is node.args[1]
    return node.args[0] if same else None


def _with_weight(norm: _Norm) -> _Norm | None:
    dtype = value_of(norm.nodes[0]).dtype
    if dtype not in (torch.float32, torch.float64) or any(
        value_of(node).dtype != dtype for node in (*norm.nodes, norm.input)
    ):
        return None
    casts: list[fx.Node] = []
    after = only_user(norm.nodes[0])
    while after is not None and _cast_to_itself(after) is not None:
        casts.append(after)
        after = only_user(after)
    normed = casts[-1] if casts else norm.nodes[0]
    for x, weight in _operands(after, FACTORS):
        value = value_of(weight)
        if x is normed and isinstance(value, Tensor):
            rows = value_of(norm.input).shape[-1:]
            if value.dtype == dtype and value.dim() == 1 and value.shape == rows:
                assert after is not None
                norm.weight, norm.nodes = weight, [*norm.nodes, *casts, after]
                break
    return norm


def _cast_to_itself(node: fx.Node) -> fx.Node | None:
    """The operand, where the node is a cast to the dtype and device that it has, which returns the
    tensor itself."""
    if not is_target(node, ("to", "float", "double", "type_as")) or set(node.kwargs) - {"dtype"}:
        return None
    operand, value = node.args[0], value_of(node)
    if not isinstance(operand, fx.Node) or not isinstance(value, Tensor) or len(node.args) > 2:
        return None
    before = value_of(operand)
    same = (before.dtype, before.device) == (value.dtype, value.device)
    return operand if same else None


# --- what comes before ----------------------------------------------------------------------------


def _with_sum(norm: _Norm) -> _Norm:
    """The norm with the sum and the dropout before it, where it can be one call with them."""
    nodes, total = list(norm.nodes), norm.input
    while all(user in nodes for user in total.users) and (x := _cast_to_itself(total)) is not None:
        nodes.append(total)
        total = x
    found = _terms(total)
    if found is None:
        return norm
    input, residual, dropout_p, more = found
    whole = _Norm(norm.kind, input, norm.weight, norm.bias, norm.eps, [*nodes, *more], residual,
                  dropout_p, total)  # fmt: skip
    ordered = only_pure_between(whole.nodes) and all(x > norm.last for x in whole.reads_sum)
    same = value_of(total).dtype == value_of(norm.last).dtype
    return whole if ordered and same else norm


def _terms(total: fx.Node) -> tuple[fx.Node, fx.Node, float, list[fx.Node]] | None:
    """input, residual, dropout's probability and the nodes of residual + dropout(input)."""
    in_place = total.target is IN_PLACE_ADD
    pairs: list[Any] = [total.args[:2]] if in_place else _operands(total, ADDS)
    pairs = [pair for pair in pairs if all(isinstance(value_of(x), Tensor) for x in pair)]
    pairs = [
        pair for pair in pairs
        if all(isinstance(x, fx.Node) for x in pair) and not _broadcasts(*map(value_of, pair))
    ]  # fmt: skip
    for dropped, residual in pairs:
        found = dropout_of(dropped)
        if found is None or found.in_place or only_user(dropped) is not total:
            continue
        if 0.0 < found.p < 1.0:
            return found.input, residual, found.p, [dropped, total]
    if in_place or not pairs:
        return None
    return *pairs[0], 0.0, [total]


def _broadcasts(a: Tensor, b: Tensor) -> bool:
    """Whether it is known now that the shapes differ."""
    sizes = zip(a.shape, b.shape, strict=False)
    known = [(m, n) for m, n in sizes if isinstance(m, int) and isinstance(n, int)]
    return a.dim() != b.dim() or any(m != n for m, n in known)


def _operands(node: Any, targets: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """The two operands of a sum or a product, in both orders."""
    if not is_target(node, targets) or len(node.args) != 2 or node.kwargs:
        return []
    one, other = node.args
    return [(one, other), (other, one)]
