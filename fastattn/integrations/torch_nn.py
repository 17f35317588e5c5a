"""``patch(model)``: swaps the layers of an existing model for fastattn's, in place, and ``unpatch`` swaps them back.

A swap changes the class of the module object and nothing else: parameters, buffers, hooks, device, dtype, mode and
state_dict keys are the same objects as before, so optimizers that are already built keep working.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fastattn import nn as fnn

_ORIGINAL_CLASS = "_fastattn_original_class"
_ORIGINAL_ATTENTION = "_fastattn_original_attn_implementation"

_ATTENTION = {
    nn.MultiheadAttention: fnn.MultiheadAttention,
    nn.TransformerEncoderLayer: fnn.TransformerEncoderLayer,
    nn.TransformerEncoder: fnn.TransformerEncoder,
}


@dataclass(frozen=True)
class Entry:
    """One module: what it became (None: left alone) and why."""

    name: str
    before: str
    after: str | None
    reason: str


@dataclass
class PatchReport:
    """What ``patch`` or ``unpatch`` did. Printable."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def swapped(self) -> list[Entry]:
        return [e for e in self.entries if e.after is not None]

    @property
    def skipped(self) -> list[Entry]:
        return [e for e in self.entries if e.after is None]

    def __str__(self) -> str:
        lines = [f"fastattn: {len(self.swapped)} swapped, {len(self.skipped)} left alone"]
        for e in self.swapped:
            lines.append(f"  {e.name}: {e.before} -> {e.after} ({e.reason})")
        for e in self.skipped:
            lines.append(f"  {e.name}: {e.before} left alone: {e.reason}")
        return "\n".join(lines)


def patch(model: nn.Module) -> PatchReport:
    """Swaps what fastattn has a kernel for, in place, and says what was swapped, what was not, and why.

    - ``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer``, ``nn.TransformerEncoder``: exact types only;
    - Linear followed by ReLU: inside ``nn.Sequential``, and where ``torch.fx`` traces the model and shows, in training
      and in eval mode, that the Linear is called once and that only a ReLU reads it;
    - a Hugging Face model's attention implementation.

    Raises TypeError when ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    report = PatchReport()
    patched_before = {id(m) for m in model.modules() if _ORIGINAL_CLASS in m.__dict__}
    _patch_transformers(model, report)
    for name, module in model.named_modules():
        if id(module) in patched_before:
            kind = type(module).__name__
            report.entries.append(Entry(name or "(root)", kind, None, "already patched"))
            continue
        _patch_attention(name, module, report)
        _patch_sequential(name, module, model, report)
    _patch_traced(model, report)
    return report


def unpatch(model: nn.Module) -> PatchReport:
    """Undoes ``patch``: every module gets its class back, a Hugging Face model its attention implementation."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    report = PatchReport()
    for name, module in model.named_modules():
        original = module.__dict__.pop(_ORIGINAL_CLASS, None)
        if original is not None:
            before, module.__class__ = type(module).__name__, original
            report.entries.append(Entry(name or "(root)", before, original.__name__, "restored"))
        implementation = module.__dict__.pop(_ORIGINAL_ATTENTION, None)
        if implementation is not None:
            module.set_attn_implementation(implementation)
            report.entries.append(
                Entry(name or "(root)", "fastattn", implementation, "attention implementation")
            )
    return report


def _swap(name: str, module: nn.Module, after: type[nn.Module], reason: str, report: PatchReport) -> None:
    before = type(module)
    module.__dict__[_ORIGINAL_CLASS] = before
    module.__class__ = after
    report.entries.append(Entry(name or "(root)", before.__name__, after.__name__, reason))


# --- attention ------------------------------------------------------------------------------------


def _patch_attention(name: str, module: nn.Module, report: PatchReport) -> None:
    after = _ATTENTION.get(type(module))
    if after is not None:
        _swap(name, module, after, "the same module on fused kernels", report)
        return
    if type(module) in _ATTENTION.values():
        return
    for before in _ATTENTION:
        if isinstance(module, before):
            reason = f"a subclass of {before.__name__} may do something else"
            report.entries.append(Entry(name or "(root)", type(module).__name__, None, reason))


def _patch_transformers(model: nn.Module, report: PatchReport) -> None:
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    from fastattn.integrations.transformers import NAME, register

    register()
    before = model.config._attn_implementation
    if before == NAME:
        return
    kind = type(model).__name__
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, ImportError) as error:
        report.entries.append(Entry("(root)", kind, None, f"attention: {error}"))
        return
    if model.config._attn_implementation != NAME:
        reason = "attention: the architecture takes no other implementation"
        report.entries.append(Entry("(root)", kind, None, reason))
        return
    model.__dict__[_ORIGINAL_ATTENTION] = before
    report.entries.append(Entry("(root)", f"{before} attention", NAME, "attention implementation"))


# --- Linear, ReLU ---------------------------------------------------------------------------------


def _uses(model: nn.Module) -> dict[int, int]:
    """How many places of the module tree hold each module."""
    counts: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        counts[id(module)] = counts.get(id(module), 0) + 1
    return counts


def _why_not_linear(linear: nn.Module, uses: dict[int, int]) -> str | None:
    """Why a Linear that a ReLU follows must stay, or None."""
    if parametrize.is_parametrized(linear):
        return "it is parametrized"
    if type(linear) is not nn.Linear:
        return "a subclass of Linear may do something else"
    if uses.get(id(linear), 1) > 1:
        return "it is shared by several places"
    if fnn.linear.has_hooks(linear):
        return "its hooks would see values after the ReLU"
    if linear.weight.device.type == "meta":
        return "it is on the meta device"
    return None


def _patch_sequential(name: str, module: nn.Module, model: nn.Module, report: PatchReport) -> None:
    if type(module) is not nn.Sequential:
        return
    uses = _uses(model)
    children = list(module.named_children())
    if fnn.MLP.fits(module) and all(_why_not_linear(m, uses) is None for m in list(module)[::2]):
        _swap(name, module, fnn.MLP, "Linear, ReLU, ..., Linear as one node", report)
        return
    for (key, linear), (_, relu) in zip(children, children[1:], strict=False):
        if not isinstance(linear, nn.Linear) or type(relu) is not nn.ReLU:
            continue
        full = f"{name}.{key}" if name else key
        reason = _why_not_linear(linear, uses)
        if reason is not None:
            report.entries.append(Entry(full, type(linear).__name__, None, reason))
            continue
        _swap(full, linear, fnn.LinearReLU, "a ReLU follows", report)
        # relu(relu(x)) = relu(x): a ReLU that others use too, or that has hooks, simply stays.
        if uses.get(id(relu), 1) == 1 and not fnn.linear.has_hooks(relu):
            relu.__dict__[_ORIGINAL_CLASS] = nn.ReLU
            relu.__class__ = fnn.FusedReLU


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("fastattn.nn")
        return ours or super().is_leaf_module(m, module_qualified_name)


def _linear_relu_names(model: nn.Module, training: bool) -> set[str]:
    """Names of the Linears that are called once and whose value only a ReLU reads, in the given mode."""
    # Tracing runs the model's own code: on a copy that shares the parameters.
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    graph = _Tracer().trace(copy.deepcopy(model, shared).train(training))
    modules = dict(model.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules.get(node.target), nn.Linear):
            calls.setdefault(node.target, []).append(node)
    return {
        name
        for name, nodes in calls.items()
        if len(nodes) == 1 and len(nodes[0].users) == 1 and _is_relu(next(iter(nodes[0].users)), modules)
    }


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_function":
        return node.target in (torch.relu, nn.functional.relu, nn.functional.relu_, torch.relu_)
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_module" and type(modules.get(node.target)) is nn.ReLU


def _patch_traced(model: nn.Module, report: PatchReport) -> None:
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    relus = any(isinstance(m, nn.ReLU) for m in model.modules())
    own_code = any(not type(m).__module__.startswith("torch.nn") for m in model.modules())
    if not linears or not (relus or own_code):
        return
    try:
        names = _linear_relu_names(model, True) & _linear_relu_names(model, False)
    except Exception as error:  # whatever the model's own code raises under tracing
        reason = f"Linear followed by ReLU was not looked for: torch.fx cannot trace it ({error})"
        reason = " ".join(reason.split())[:200]
        report.entries.append(Entry("(root)", type(model).__name__, None, reason))
        return
    uses, modules = _uses(model), dict(model.named_modules())
    already = {e.name for e in report.entries}
    inside = tuple(n for n, m in modules.items() if isinstance(m, fnn.MLP | nn.TransformerEncoderLayer))
    for name in sorted(names):
        if name in already or any(name.startswith(f"{n}." if n else "") for n in inside):
            continue
        linear = modules[name]
        reason = _why_not_linear(linear, uses)
        if reason is not None:
            report.entries.append(Entry(name, type(linear).__name__, None, reason))
        else:
            _swap(name, linear, fnn.LinearReLU, "torch.fx: only a ReLU reads it", report)
