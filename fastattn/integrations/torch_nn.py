"""``patch(model)``: swaps the layers of an existing model for fastattn's, in place; ``unpatch``
swaps them back.

A swap changes the class of a module object and nothing else. Parameters, buffers, hooks, device,
dtype, mode and state_dict keys are the same objects as before, so that optimizers already built
keep working.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastattn import backends
from fastattn import nn as fnn
from fastattn.integrations import pretrained, tracing, transformers
from fastattn.integrations.report import Entry, PatchReport
from fastattn.integrations.sequential import FusedSequential, linear_relu_pairs
from fastattn.nn.linear import has_hooks

__all__ = ["Entry", "PatchReport", "patch", "unpatch"]

_FORMER_CLASS = "_fastattn_former_class"

_ATTENTION = {
    nn.MultiheadAttention: fnn.MultiheadAttention,
    nn.TransformerEncoderLayer: fnn.TransformerEncoderLayer,
    nn.TransformerEncoder: fnn.TransformerEncoder,
}
_SWAPPED = (*_ATTENTION.values(), fnn.MLP, fnn.LinearReLU, fnn.FusedReLU, FusedSequential)


def patch(model: nn.Module) -> PatchReport:
    """Swaps what fastattn has a kernel for, in place, and says what was swapped, what was not, and
    why.

    - ``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer``, ``nn.TransformerEncoder``: exact
      types only.
    - Linear, ReLU inside an ``nn.Sequential``, which then fuses them as it runs.
    - Linear, ReLU in a forward of the model's own, where ``torch.fx`` can trace it and shows, in
      training and in eval mode, that the Linear is called once and only a ReLU reads the result.
      From then on the Linear returns values after the ReLU, to a hook that is registered later as
      well.
    - The attention of Hugging Face models that is set to sdpa, see
      ``fastattn.integrations.pretrained``.

    Anything else is left alone, and so is a module whose device or dtype no kernel serves. Tracing
    replaces ``nn.Module.__call__`` for its duration: no other thread may run a model meanwhile.

    Raises TypeError when ``model`` is not an ``nn.Module``.
    """
    _check(model)
    report = PatchReport()
    for name, module in model.named_modules():
        if _FORMER_CLASS in vars(module):
            report.add(name, module, None, "already patched")
    _patch_transformers(model, report)
    for name, module in model.named_modules():
        _patch_attention(name, module, report)
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            _patch_sequential(name, module, report)
    _patch_forwards(model, report)
    return report


def unpatch(model: nn.Module) -> PatchReport:
    """Undoes ``patch``: every module gets its class back, a Hugging Face model its attention
    implementation."""
    _check(model)
    report = PatchReport()
    for name, module in model.named_modules():
        if _FORMER_CLASS in vars(module):
            if type(module) not in _SWAPPED:
                report.add(name, module, None, "its class was changed after patch; undo that first")
                continue
            before, module.__class__ = type(module), vars(module).pop(_FORMER_CLASS)
            report.add(name, before, module, "restored")
        attention = pretrained.undo(module)
        if attention is not None:
            report.add(name, *attention)
    return report


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def _swap(
    name: str, module: nn.Module, after: type[nn.Module], reason: str, report: PatchReport
) -> None:
    before = type(module)
    vars(module)[_FORMER_CLASS] = before
    module.__class__ = after
    report.add(name, before, after, reason)


def _why_not(module: nn.Module, op: str) -> str | None:
    """Why a module whose class fits must stay as it is, or None."""
    if any(parametrize.is_parametrized(m) for m in module.modules()):
        return "it is parametrized"
    for p in module.parameters():
        if isinstance(p, nn.parameter.UninitializedTensorMixin):
            return "it is lazy: run the model once, then patch"
        if type(p) is not nn.Parameter:
            return f"its parameters are of type {type(p).__name__}"
        if p.device.type == "meta":
            return "it is on the meta device"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    p = next(module.parameters(), None)
    return None if p is None else _no_kernel(op, p.device, p.dtype)


def _no_kernel(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reasons of all backends with kernels, where none serves ``op``."""
    problem = backends.Problem(op, device.type, dtype)
    against = {
        b: backends.default_reasons(problem, b) for b in backends.BACKENDS if b != "reference"
    }
    if not all(against.values()):
        return None
    why = (f"{b}: {', '.join(reasons)}" for b, reasons in against.items())
    return f"no kernel serves {dtype} on {device.type} ({'; '.join(why)})"


# --- attention ------------------------------------------------------------------------------------


def _patch_attention(name: str, module: nn.Module, report: PatchReport) -> None:
    former = next((c for c in _ATTENTION if isinstance(module, c)), None)
    if former is None or isinstance(module, tuple(_ATTENTION.values())):
        return
    if type(module) is former:
        reason = _why_not(module, "attention")
        if reason is None:
            _swap(name, module, _ATTENTION[former], "the same layer on fused kernels", report)
            return
    elif parametrize.is_parametrized(module):
        reason = "it is parametrized"
    else:
        reason = f"a subclass of {former.__name__} may do something else"
    report.add(name, module, None, reason)


def _patch_transformers(model: nn.Module, report: PatchReport) -> None:
    parts = pretrained.plan(model)
    if any(part.reason is None for part in parts):
        transformers.register()
    for part in parts:
        if part.reason is not None:
            report.add(part.name, part.before, None, part.reason)
            continue
        part.apply()
        reason = f"{part.attentions} modules take their attention from the AttentionInterface"
        report.add(part.name, part.before, f"{pretrained.NAME} attention", reason)


# --- Linear, ReLU ---------------------------------------------------------------------------------


def _why_not_linear(linear: nn.Linear) -> str | None:
    """Why a Linear that a ReLU follows must stay, or None."""
    if parametrize.is_parametrized(linear):
        return "it is parametrized"
    if isinstance(linear, nn.LazyLinear):
        return "it is lazy: run the model once, then patch"
    if type(linear) is not nn.Linear:
        return "a subclass of Linear may do something else"
    if has_hooks(linear):
        return "its hooks would see values after the ReLU"
    return _why_not(linear, "linear_relu")


def _patch_sequential(name: str, module: nn.Sequential, report: PatchReport) -> None:
    if type(module).forward is not nn.Sequential.forward:
        return  # fastattn's own, or other code that torch.fx looks at
    keys, layers = list(module._modules), list(module)
    fused = []
    for i, layer in enumerate(layers[:-1]):
        if not isinstance(layer, nn.Linear) or not isinstance(layers[i + 1], nn.ReLU):
            continue
        reason = _why_not_linear(layer)
        if reason is None and linear_relu_pairs(layers, i) == 0:
            reason = "the ReLU behind it has hooks or is of a subclass"
        if reason is None and (type(module) is not nn.Sequential or "forward" in vars(module)):
            reason = "it is in a subclass of Sequential, or one whose forward was replaced"
        if reason is None:
            fused.append(keys[i])
        else:
            report.add(f"{name}.{keys[i]}" if name else keys[i], layer, None, reason)
    if not fused:
        return
    whole = fnn.MLP.fits(module) and len(fused) == len(layers) // 2
    if whole and _why_not_linear(layers[-1]) is None:
        _swap(name, module, fnn.MLP, "Linear, ReLU, ..., Linear as one kernel call", report)
    else:
        pairs = ", ".join(fused)
        _swap(name, module, FusedSequential, f"ReLU done by the Linears {pairs}", report)


def _patch_forwards(model: nn.Module, report: PatchReport) -> None:
    places = Counter(child for m in model.modules() for child in m._modules.values())
    owned = {x for m in model.modules() if tracing.has_own_code(m) for x in _own_linears(m)}
    evidence = tracing.trace(model, owned) if owned else tracing.Evidence()
    names = {module: name for name, module in model.named_modules()}
    for linear in (m for m in names if m in owned and evidence.near_relu(m)):
        relu = evidence.relu_of(linear)
        reason = _why_not_linear(linear)
        if reason is None and places[linear] > 1:
            reason = "it is shared by several places"
        reason = reason or evidence.why_not(linear)
        if reason is None and any(u.relu and has_hooks(u.relu) for u in evidence.uses[linear]):
            reason = "the hooks of the ReLU behind it would see other inputs"
        replaceable = relu is not None and places[relu] == 1
        if (
            reason is None
            and not replaceable
            and any(u.relu and u.relu.inplace for u in evidence.uses[linear])
        ):
            reason = "the ReLU behind it works in place and is shared"
        if reason is not None:
            report.add(names[linear], linear, None, reason)
            continue
        _swap(
            names[linear], linear, fnn.LinearReLU, "torch.fx: only a ReLU reads its result", report
        )
        if replaceable:
            _swap(names[relu], relu, fnn.FusedReLU, f"done by {names[linear]}", report)
    _report_failures(evidence, names, report)


def _own_linears(module: nn.Module) -> Iterator[nn.Linear]:
    for child in tracing.own_children(module):
        if isinstance(child, nn.Linear) and not isinstance(child, fnn.LinearReLU):
            yield child


def _report_failures(
    evidence: tracing.Evidence, names: dict[nn.Module, str], report: PatchReport
) -> None:
    """One entry for each class that was not traced and may hold a Linear with a ReLU behind it."""
    untraced = [
        m
        for m in evidence.failures
        if tracing.mentions_relu(m) and any(True for _ in _own_linears(m))
    ]
    classes = Counter(type(m) for m in untraced)
    for kind, count in classes.items():
        first = next(m for m in untraced if type(m) is kind)
        others = f" (and {count - 1} more)" if count > 1 else ""
        report.add(f"{names[first] or '(root)'}{others}", first, None, evidence.failures[first])
