"""Linear layers whose weight is ``[in_features, out_features]`` in a graph, such as the Conv1D of
GPT-2: views around ``torch.addmm``, and then the activation and the dropout."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fastattn import _products
from fastattn.functional import _served, drop_in
from fastattn.integrations.graph.activations import find_activation
from fastattn.integrations.graph.layers import static_work
from fastattn.integrations.graph.nodes import (
    Rewriting,
    active_dropout_after,
    is_target,
    modes_between,
    name_of,
    only_user,
    unsupported,
    value_of,
)


def put_addmm(rewriting: Rewriting, node: fx.Node) -> None:
    """bias + input weight and what follows it as one call, or says why not."""
    if node.target is not torch.addmm or len(node.args) != 3 or node.kwargs:
        return
    bias, input, weight = (value_of(x) for x in node.args)
    if not all(isinstance(x, Tensor) for x in (bias, input, weight)) or bias.dim() != 1:
        return
    reason = unsupported("linear_relu", node, *node.args)
    n_in, n_out = weight.shape
    if reason is None and bias.shape != (n_out,):
        reason = "its bias is broadcast"
    dtype, device = value_of(node).dtype, value_of(node).device
    why = _products.why_swap(n_out, n_in, dtype, device)
    if reason is None and (why is None or _is_small(input, weight)):
        reason = "torch's own product"
    if reason is not None:
        return rewriting.leave(node, "addmm", reason)
    _put(rewriting, node)


def _is_small(input: Tensor, weight: Tensor) -> bool:
    work = static_work(input, [weight])
    return work is not None and not _served.crosswise_product_wins(input, weight)


def _put(rewriting: Rewriting, node: fx.Node) -> None:
    view = only_user(node)
    follows = view if is_target(view, ("view", "reshape")) else node
    assert follows is not None
    activation, dropout_p, nodes = _followers(follows)
    kind = ", ".join(
        ["addmm", *([activation] if activation else []), *(["dropout"] if dropout_p else [])]
    )
    rewriting.fuse(name_of(node), kind, "fastattn linear")
    if nodes:  # the view comes after them as well as before them
        nodes[-1].replace_all_uses_with(follows, delete_user_cb=lambda user: user not in nodes)
        for each in reversed(nodes):
            rewriting.graph.erase_node(each)
        rewriting.taken.update(nodes)
    rewriting.put([node], node, drop_in.addmm, (*node.args, activation, dropout_p))


def _followers(node: fx.Node) -> tuple[str | None, float, list[fx.Node]]:
    """The activation and the dropout that alone read ``node``, and their nodes."""
    found = find_activation(node)
    taken = found is not None and not found.others and not modes_between(node, found.nodes[-1])
    nodes = found.nodes if found is not None and taken else []
    dropout_p, dropout = active_dropout_after(nodes[-1] if nodes else node)
    return found.name if found is not None and taken else None, dropout_p, [*nodes, *dropout]
