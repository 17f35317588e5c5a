"""Kernels in a graph of torch's functions, as Dynamo captures it.

The graph shows everything that reads a result, which a module cannot know: a linear layer and the
ReLU after it become one call where nobody else reads what is between. What is put in returns what
it replaces returned, to rounding, and decides at each call, by the size of the problem, whether the
kernel or torch's own code runs.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from fastattn.integrations.graph.addmm import put_addmm
from fastattn.integrations.graph.attention import put_attention
from fastattn.integrations.graph.elementwise import put_elementwise
from fastattn.integrations.graph.layers import put_layers
from fastattn.integrations.graph.nodes import Rewriting
from fastattn.integrations.graph.norms import put_norm
from fastattn.integrations.graph.shared_input import put_gated, put_shared
from fastattn.integrations.report import CompileReport

_PUT = (put_attention, put_norm, put_gated, put_shared, put_layers, put_addmm, put_elementwise)
_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def with_kernels(gm: fx.GraphModule, report: CompileReport) -> fx.GraphModule:
    """``gm`` with kernels put into its graph; ``report`` is told what was done and what was not.
    ``gm`` stays as it is, and its parameters are shared."""
    gm = _copy(gm)
    rewriting = Rewriting(gm.graph, report)
    for node in list(gm.graph.nodes):
        rewriting.remove_without_effect(node)
    for put in _PUT:  # the longest patterns first
        for node in list(gm.graph.nodes):
            if node not in rewriting.taken:
                put(rewriting, node)
    for node in gm.graph.find_nodes(op="call_function", target=_CHECKPOINT):
        _put_checkpoint(gm, node, report)
    rewriting.finish()
    gm.graph.lint()
    gm.recompile()
    return gm


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    return copy


def _put_checkpoint(gm: fx.GraphModule, node: fx.Node, report: CompileReport) -> None:
    """Activation checkpointing: the operation only marks what a later compiler should recompute,
    and there is none here, so that the checkpoint itself has to run."""
    body = node.args[0]
    if not isinstance(body, fx.Node) or body.op != "get_attr":
        return
    name = str(body.target)
    inner = gm.get_submodule(name)
    if isinstance(inner, fx.GraphModule):
        gm.set_submodule(name, with_kernels(inner, report))
        node.target = _checkpoint


def _checkpoint(body: fx.GraphModule, *args: object, **kwargs: object) -> tuple:
    given, of_body = _CHECKPOINT.divide_kwargs(kwargs)
    context = body.meta.get("_checkpoint_context_fn")
    if context is not None:
        given["context_fn"] = context
    return checkpoint(body, *args, **{"use_reentrant": False, **given}, **of_body)
