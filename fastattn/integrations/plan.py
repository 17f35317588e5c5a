"""What ``patch`` would do to a model, decided before anything is changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastattn import _products, backends
from fastattn import nn as fnn
from fastattn.functional._served import small_below
from fastattn.integrations import blocks, pretrained
from fastattn.integrations import unpad as unpadding
from fastattn.integrations.report import PatchReport
from fastattn.integrations.sequential import FusedSequential
from fastattn.integrations.swaps import AttentionSwap, ClassSwap
from fastattn.nn._plain import (
    FORMER_CLASS,
    has_hooks,
    is_plain,
)
from fastattn.nn.linear import is_plain_linear

ATTENTION = {
    nn.MultiheadAttention: fnn.MultiheadAttention,
    nn.TransformerEncoderLayer: fnn.TransformerEncoderLayer,
    nn.TransformerEncoder: fnn.TransformerEncoder,
}


@dataclass
class Plan:
    """The swaps to make in a model, and the modules to leave alone. ``print`` gives lines,
    ``rich.print`` a table.

    >>> import fastattn
    >>> from torch import nn
    >>> made = fastattn.plan(nn.TransformerEncoderLayer(64, 4, 128))
    >>> len(made.swaps) == len(made.apply().swapped) > 0
    True
    """

    model: nn.Module
    swaps: list[ClassSwap | AttentionSwap] = field(default_factory=list)
    left: PatchReport = field(default_factory=PatchReport)
    dropout: bool = True

    def swap(
        self,
        name: str,
        module: nn.Module,
        after: type[nn.Module],
        reason: str,
        small_below: int | None = None,
        unpad: bool = False,
    ) -> None:
        """Adds the swap of a module's class."""
        self.swaps.append(
            ClassSwap(name, module, type(module), after, reason, small_below, self.dropout, unpad)
        )

    @property
    def report(self) -> PatchReport:
        """What ``apply`` would report."""
        report = PatchReport(list(self.left.entries), dry_run=True, notes=list(self.left.notes))
        for swap in self.swaps:
            report.add(swap.name, swap.before, swap.after, swap.reason)
        return report

    def apply(self) -> PatchReport:
        """Makes the swaps, all or none: an exception leaves the model as it was.

        Returns:
            The report of what was swapped.

        Raises:
            RuntimeError: the model has changed since it was planned.
        """
        report = PatchReport(list(self.left.entries), notes=list(self.left.notes))
        done: list[ClassSwap | AttentionSwap] = []
        try:
            for swap in self.swaps:
                swap.do()
                done.append(swap)
                report.add(swap.name, swap.before, swap.after, swap.reason)
        except BaseException:
            for swap in reversed(done):
                swap.undo()
            raise
        return report

    def __str__(self) -> str:
        return str(self.report)

    def __rich__(self) -> Table:
        return self.report.__rich__()


def plan(model: nn.Module, *, dropout: bool = True, unpad: bool = False) -> Plan:
    """What ``patch(model)`` would do. The model is looked at; it is not run and not changed.

    Args:
        model: any module.
        dropout: as in ``patch``.
        unpad: as in ``patch``.

    Returns:
        The Plan, whose ``apply`` makes the swaps.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``dropout`` or ``unpad`` is no bool.
        ValueError: ``unpad`` beside ``dropout=False``.

    >>> import fastattn
    >>> from torch import nn
    >>> model = nn.TransformerEncoderLayer(64, 4, 128)
    >>> fastattn.plan(model).swaps[0].after
    <class 'fastattn.nn.transformer.TransformerEncoderLayer'>
    """
    check(model)
    for name, option in (("dropout", dropout), ("unpad", unpad)):
        if not isinstance(option, bool):
            raise TypeError(f"{name}: expected a bool, got {type(option).__name__}")
    if unpad and not dropout:
        raise ValueError(
            "unpad: expected False beside dropout=False, got True: fewer elements draw fewer "
            "random numbers"
        )
    made = Plan(model, dropout=dropout)
    for part in pretrained.plan(model):
        if part.reason is None:
            made.swaps.append(AttentionSwap(part, dropout))
        else:
            made.left.add(part.name, part.before, None, part.reason)
    if unpad:
        _plan_unpadded(model, made)
    scripted: set[nn.Module] = set()
    attention: tuple[type[nn.Module], ...] = tuple(ATTENTION)
    for name, module in model.named_modules():
        if module in scripted:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            scripted.update(module.modules())
            made.left.add(name, module, None, "it is scripted: patch the model, then script it")
        elif FORMER_CLASS in vars(module):
            made.left.add(name, module, None, "already patched")
        elif isinstance(module, attention):
            _plan_attention(name, module, made, unpad)
        elif isinstance(module, nn.Sequential):
            _plan_sequential(name, module, made)
        elif (block := blocks.planned(module)) is not None:
            _plan_block(name, module, block, made)
        elif type(module) is nn.Linear:
            _plan_linear(name, module, made)
        elif type(module) is nn.Dropout and dropout:
            _plan_dropout(name, module, made)
    _report_own_forwards(model, scripted, made)
    _note_linears(model, scripted, made)
    return made


def check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def _plan_unpadded(model: nn.Module, made: Plan) -> None:
    """Plans that the encoders of known classes skip padding, and notes why others do not."""
    parts = [swap.part for swap in made.swaps if isinstance(swap, AttentionSwap)]
    ours = {id(c) for part in parts for c in part.configs}
    found = False
    for name, module in model.named_modules():
        found = found or isinstance(module, nn.TransformerEncoder)
        after = unpadding.unpadded(type(module))
        if after is None or FORMER_CLASS in vars(module):
            continue
        found = True
        configs = list(unpadding.configs(module))
        if "forward" in vars(module):
            made.left.add(name, module, None, "its forward was replaced on the instance")
        elif not configs or not all(id(c) in ours for c in configs):
            made.left.add(name, module, None, "padding stays: its attention is not fastattn's")
        else:
            why = "tokens alone, packed one sequence behind the other; 0 at padding"
            made.swap(name, module, after, why)
    if not found:
        made.left.notes.append(
            "unpad: no encoder in which each token is known to be computed by itself: the model "
            "runs padded"
        )


def _plan_attention(name: str, module: nn.Module, made: Plan, unpad: bool) -> None:
    if isinstance(module, tuple(ATTENTION.values())):
        return  # fastattn's own
    former = next(c for c in ATTENTION if isinstance(module, c))
    if type(module) is former:
        reason = _unsupported(module, "attention")
    elif parametrize.is_parametrized(module):
        reason = "it is parametrized"
    else:
        reason = f"a subclass of {former.__name__} may do something else"
    if reason is None:
        after, why = ATTENTION[former], "the same layer on fused kernels"
        skips = unpad and former is nn.TransformerEncoder
        why += ", without padding: 0 there" if skips else ""
        made.swap(name, module, after, why, unpad=skips)
    else:
        made.left.add(name, module, None, reason)


def _plan_sequential(name: str, module: nn.Sequential, made: Plan) -> None:
    if isinstance(module, FusedSequential | fnn.MLP):
        return  # fastattn's own
    keys, layers = list(module._modules), list(module)
    fused = []
    for key, layer, after in zip(keys, layers, layers[1:], strict=False):
        if not isinstance(layer, nn.Linear) or not isinstance(after, nn.ReLU):
            continue
        reason = _unsupported_linear(layer)
        if reason is None and not is_plain(after, nn.ReLU):
            reason = "the ReLU after it has hooks, or its class is a subclass of ReLU"
        if reason is None and (type(module) is not nn.Sequential or "forward" in vars(module)):
            reason = "it is in a subclass of Sequential, or one whose forward was replaced"
        if reason is None:
            fused.append(key)
        else:
            made.left.add(f"{name}.{key}" if name else key, layer, None, reason)
    if fused:
        why = f"Linear, ReLU as one kernel call where that is faster: {', '.join(fused)}"
        made.swap(name, module, FusedSequential, why, small_below(layers))


def _plan_block(name: str, module: nn.Module, block: blocks.Planned, made: Plan) -> None:
    reason = _unsupported(module, "dropout_add_norm")
    if reason is None:
        made.swap(name, module, *block)
    else:
        made.left.add(name, module, None, reason)


def _plan_linear(name: str, linear: nn.Linear, made: Plan) -> None:
    """Plans to swap a Linear whose product the kernels may win, in its dtype or in autocast's."""
    weight = linear._parameters.get("weight")
    if weight is None or _unsupported_linear(linear) is not None:
        return
    why = _why_swap(weight)
    if why is not None:
        made.swap(name, linear, fnn.Linear, why)


def _plan_dropout(name: str, module: nn.Dropout, made: Plan) -> None:
    """Plans to swap a dropout that drops something, in a model on a CPU."""
    device = next((p.device.type for p in made.model.parameters()), "cpu")
    if device in ("cpu", "meta") and 0.0 < module.p < 1.0 and not module.inplace:
        reason = _unsupported(module, "activation_dropout")
        if reason is None:
            made.swap(name, module, fnn.Dropout, "no mask is stored; faster where it is large")
        else:
            made.left.add(name, module, None, reason)


def _why_swap(weight: Tensor) -> str | None:
    return _products.why_swap(*_facts(weight))


def _facts(weight: Tensor) -> tuple[Any, ...]:
    """n_out, n_in, dtype and the device that the module will be called on."""
    return *weight.shape, weight.dtype, torch.device("cpu") if weight.is_meta else weight.device


def _note_linears(model: nn.Module, scripted: set[nn.Module], made: Plan) -> None:
    """One line for each reason for which Linears keep torch's product. Those in a layer that is to
    be swapped are that layer's."""
    swapped = {m for s in made.swaps if isinstance(s, ClassSwap) for m in s.module.modules()}
    apart = scripted | swapped
    reasons = Counter(
        _products.why_left(*_facts(m.weight))
        for m in model.modules()
        if type(m) is nn.Linear and m not in apart and m._parameters.get("weight") is not None
        and _unsupported_linear(m) is None and _why_swap(m.weight) is None
    )  # fmt: skip
    for reason, count in reasons.items():
        made.left.notes.append(f"{count} Linear left to torch's own product: {reason}")


def _unsupported_linear(linear: nn.Linear) -> str | None:
    """Why a Linear that a ReLU follows must be called by itself, or None."""
    if parametrize.is_parametrized(linear):
        return "it is parametrized"
    if isinstance(linear, nn.LazyLinear):
        return "it is lazy: run the model once, then patch"
    if type(linear) not in (nn.Linear, fnn.Linear):
        return "a subclass of Linear may do something else"
    reason = _unsupported(linear, "linear_relu")
    if reason is None and not is_plain_linear(linear):
        reason = (
            "it has hooks" if has_hooks(linear) else "nn.Linear.forward or F.linear is replaced"
        )
    return reason


def _unsupported(module: nn.Module, op: str) -> str | None:
    """Why a module whose class fits must stay as it is, or None."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if isinstance(module, nn.TransformerEncoder):
        return None  # it only calls its layers, each of which has an answer of its own
    if any(parametrize.is_parametrized(m) for m in module.modules()):
        return "it is parametrized"
    for p in module.parameters():
        if isinstance(p, nn.parameter.UninitializedTensorMixin):  # type: ignore[attr-defined]
            return "it is lazy: run the model once, then patch"
        if type(p) is not nn.Parameter:
            return f"its parameters are of type {type(p).__name__}"
    first = next(module.parameters(), None)
    return None if first is None else backends.why_no_kernel(op, first.device, first.dtype)


def _report_own_forwards(model: nn.Module, scripted: set[nn.Module], made: Plan) -> None:
    """Reports each class with a forward of its own that is not known and may put a ReLU after a
    Linear, in one entry."""
    known = scripted | {s.module for s in made.swaps if isinstance(s, ClassSwap)}
    found = [
        (name or "(root)", type(module))
        for name, module in model.named_modules()
        if module not in known and FORMER_CLASS not in vars(module) and _may_join(module)
    ]
    for kind, count in Counter(kind for _, kind in found).items():
        first = next(name for name, k in found if k is kind)
        others = f" (and {count - 1} more)" if count > 1 else ""
        made.left.add(
            f"{first}{others}", kind, None,
            "its own forward joins Linear and ReLU, and only that code knows what else reads "
            "their results: they are left apart, on torch's own product; "
            'torch.compile(model, backend="fastattn") sees it, and fuses them',
        )  # fmt: skip


def _may_join(module: nn.Module) -> bool:
    """Whether the module has a forward that is not torch's, a Linear to call and a ReLU."""
    kind = type(module)
    home = getattr(kind.forward, "__module__", None) or kind.__module__
    if home.startswith(("torch.", "fastattn.")):
        return False
    children = [
        m
        for child in module.children()
        for m in (child.children() if type(child) in (nn.ModuleList, nn.ModuleDict) else [child])
    ]
    if not any(isinstance(m, nn.Linear) for m in children):
        return False
    codes = (getattr(f, "__code__", None) for c in kind.__mro__ for f in vars(c).values()
             if c.__module__.partition(".")[0] != "torch")  # fmt: skip
    return any(isinstance(m, nn.ReLU) for m in children) or any(
        "relu" in name for code in codes if code is not None for name in code.co_names
    )
