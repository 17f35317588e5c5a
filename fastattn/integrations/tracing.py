"""Which Linears feed a ReLU and nothing else, found by ``torch.fx``.

Every module with a forward of its own is traced alone, its children opaque, in training and in eval
mode: control flow that cannot be traced hides one module and not the whole model. Tracing runs the
module's code, so it gets a
copy whose parameters and buffers are on the meta device: whatever that code does to them does not
reach the model.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_RELU = (torch.relu, F.relu, "relu")
_RELU_IN_PLACE = (torch.relu_, F.relu_, "relu_")


@dataclass
class _Use:
    """One call of a module, and for a Linear the ReLU behind it."""

    caller: nn.Module
    training: bool
    near_relu: bool = False  # a ReLU is among what reads the result
    relu: nn.ReLU | None = None  # where that ReLU is a module
    problem: str | None = None  # why the Linear may not do the ReLU itself


@dataclass
class Evidence:
    """What tracing showed."""

    uses: dict[nn.Module, list[_Use]] = field(default_factory=lambda: defaultdict(list))
    read: set[nn.Module] = field(
        default_factory=set
    )  # modules whose parameters some code reads itself
    failures: dict[nn.Module, str] = field(
        default_factory=dict
    )  # what could not be traced, and why

    def near_relu(self, linear: nn.Module) -> bool:
        return linear in self.uses and any(use.near_relu for use in self.uses[linear])

    def why_not(self, linear: nn.Module) -> str | None:
        """None where ``linear`` is called once, in both modes, and only a ReLU reads the result."""
        uses = self.uses[linear]
        if len({use.caller for use in uses}) > 1 or len({use.training for use in uses}) < len(uses):
            return "it is called more than once"
        if len(uses) < 2:
            return "it is called in one of training and eval mode only"
        if linear in self.read:
            return "its parameters are also read directly"
        return next((use.problem for use in uses if use.problem is not None), None)

    def relu_of(self, linear: nn.Module) -> nn.ReLU | None:
        """The ReLU module that is called for ``linear``'s result and for nothing else."""
        relu = self.uses[linear][0].relu
        same = relu is not None and all(use.relu is relu for use in self.uses[linear])
        return relu if same and len(self.uses[relu]) == len(self.uses[linear]) else None


def trace(model: nn.Module, wanted: set[nn.Module]) -> Evidence:
    """Evidence from each module of ``model`` that has code of its own and ``wanted`` modules below
    it."""
    evidence = Evidence()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    for module in model.modules():
        if not has_own_code(module) or wanted.isdisjoint(module.modules()):
            continue
        if "forward" in module.__dict__:
            evidence.failures[module] = "its forward was replaced on the instance"
            continue
        try:
            with torch.random.fork_rng(devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graphs = {training: _graph(module, training) for training in (True, False)}
        except Exception as error:  # whatever the module's own code raises under tracing
            text = " ".join(str(error).split())
            evidence.failures[module] = (
                f"torch.fx cannot trace it ({text[:120] or type(error).__name__})"
            )
            continue
        for training, graph in graphs.items():
            _collect(module, training, graph, evidence)
    return evidence


def has_own_code(module: nn.Module) -> bool:
    """Whether its forward is neither torch's nor fastattn's."""
    if isinstance(module, fx.GraphModule):
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return False
    kind = type(module)
    source = getattr(kind.forward, "__module__", None) or kind.__module__
    return not source.startswith(("torch.", "fastattn."))


def own_children(module: nn.Module) -> Iterator[nn.Module]:
    """What a module's forward is the one to call: its children and those of its lists."""
    for child in module.children():
        if type(child) in (nn.ModuleList, nn.ModuleDict):
            yield from own_children(child)
        else:
            yield child


def mentions_relu(module: nn.Module) -> bool:
    """Whether its forward may use a ReLU: a child is one, an attribute, or a name in its code."""
    if any(isinstance(m, nn.ReLU) for m in own_children(module)):
        return True
    if any(v is torch.relu or v is F.relu for v in vars(module).values()):
        return True
    mro = type(module).__mro__
    codes = (
        getattr(f, "__code__", None) for c in mro[: mro.index(nn.Module)] for f in vars(c).values()
    )
    return any("relu" in name for code in codes if code is not None for name in code.co_names)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _graph(module: nn.Module, training: bool) -> fx.Graph:
    def on_meta(t: Tensor) -> Tensor:
        if isinstance(t, nn.parameter.UninitializedTensorMixin):
            return t
        empty = torch.empty_like(t, device="meta")
        return nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty

    memo = {id(t): on_meta(t) for t in (*module.parameters(), *module.buffers())}
    return _Tracer().trace(copy.deepcopy(module, memo).train(training))


def _collect(caller: nn.Module, training: bool, graph: fx.Graph, evidence: Evidence) -> None:
    for node in graph.nodes:
        if node.op == "get_attr":
            evidence.read.add(caller.get_submodule(node.target.rpartition(".")[0]))
        if node.op != "call_module":
            continue
        use = _Use(caller, training)
        readers = list(node.users)
        use.near_relu = any(_is_relu(caller, reader) for reader in readers)
        if len(readers) != 1 or not use.near_relu:
            use.problem = "more than a ReLU reads its result"
        elif readers[0].op == "call_module":
            use.relu = caller.get_submodule(readers[0].target)
        elif _in_place(readers[0]):
            use.problem = "the ReLU behind it works in place"
        evidence.uses[caller.get_submodule(node.target)].append(use)


def _is_relu(caller: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(caller.get_submodule(node.target)) is nn.ReLU
    return node.op != "output" and node.target in (*_RELU, *_RELU_IN_PLACE)


def _in_place(node: fx.Node) -> bool:
    return node.target in _RELU_IN_PLACE or bool(node.kwargs.get("inplace")) or len(node.args) > 1
