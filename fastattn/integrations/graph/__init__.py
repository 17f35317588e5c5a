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

from fastattn.integrations.graph.attention import PUT, put_written_attention
from fastattn.integrations.graph.layers import put_layers
from fastattn.integrations.graph.nodes import LINEAR, Rewriting
from fastattn.integrations.report import CompileReport

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def with_kernels(gm: fx.GraphModule, report: CompileReport) -> fx.GraphModule:
    """``gm`` with kernels put into its graph; ``report`` is told what was done and what was not.
    ``gm`` stays as it is, and its parameters are shared."""
    gm = _copy(gm)
    rewriting = Rewriting(gm.graph, report)
    for node in list(gm.graph.nodes):
        if node in rewriting.taken:
            continue
        if node.target is LINEAR:
            put_layers(rewriting, node)
        elif node.target is _CHECKPOINT:
            _put_checkpoint(gm, node, report)
        elif node.op == "call_function" and node.target in PUT:
            PUT[node.target](rewriting, node)
        else:
            put_written_attention(rewriting, node)
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
