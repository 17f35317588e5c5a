"""A model as a chain of linear layers and ReLUs, and the guards that tell whether it still is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from types import CodeType, FunctionType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastattn import backends
from fastattn.functional._torch_internals import has_hooks
from fastattn.integrations.sequential import FusedSequential
from fastattn.nn import MLP, LinearReLU
from fastattn.nn._plain import CALL, as_written, is_plain
from fastattn.nn.dropout import active_dropout, is_plain_dropout
from fastattn.nn.linear import is_plain_linear
from fastattn.training._forward import Reference, read_forward
from fastattn.training._unknown import NotServed

DTYPES = (torch.float32, torch.float64)
CONTAINERS = (nn.Sequential, FusedSequential, MLP)
_ABSENT = {dtype: torch.empty(0, dtype=dtype) for dtype in DTYPES}  # in a bias's place


class _Module(NamedTuple):
    """A module that is called, as it was read."""

    module: nn.Module
    kind: type[nn.Module]
    children: tuple[tuple[str, nn.Module | None], ...]
    facts: tuple[tuple[str, object], ...]  # attributes that its meaning depends on

    def holds(self) -> bool:
        module = self.module
        if type(module) is not self.kind or has_hooks(module):
            return False
        own = module.__dict__
        if tuple(own["_modules"].items()) != self.children:
            return False
        return all(own.get(name) == value for name, value in self.facts)


class _Layer(NamedTuple):
    linear: nn.Module
    weight: Tensor
    bias: Tensor | None

    def holds(self) -> bool:
        own = self.linear.__dict__
        parameters = own["_parameters"]
        return (
            parameters.get("weight") is self.weight
            and parameters.get("bias") is self.bias
            and "weight" not in own
            and "bias" not in own
        )


class _Parameter(NamedTuple):
    parameter: Tensor
    address: int
    shape: torch.Size

    def holds(self) -> bool:
        p = self.parameter
        return (
            p.data_ptr() == self.address
            and p.shape == self.shape
            and p.is_contiguous()
            and p.requires_grad
            and not p._backward_hooks
            and not p._post_accumulate_grad_hooks
        )


class _Forward(NamedTuple):
    kind: type[nn.Module]
    function: FunctionType
    code: CodeType

    def holds(self) -> bool:
        kind = self.kind
        called = kind.__call__ is CALL and kind.forward is self.function
        return called and self.function.__code__ is self.code


class Network:
    """What a model is: how its input is reshaped, its layers, which of them a ReLU follows."""

    def __init__(self, model: nn.Module) -> None:
        """Raises NotServed where the model is no such chain."""
        self.reshapes: list[Callable[[Tensor], Tensor]] = []
        self.relus: list[bool] = []
        self._modules: list[_Module] = []
        self._layers: list[_Layer] = []
        self._forwards: list[_Forward] = []
        self._references: list[Reference] = []
        self._read(model, "the model")
        if not self._layers:
            raise NotServed("the model has no linear layer")
        kinds = (m.kind for m in self._modules)
        self._kinds: set[type[nn.Module]] = {nn.Linear, nn.Sequential, *kinds}
        pairs = [(layer.weight, layer.bias) for layer in self._layers]
        self.trained = [p for pair in pairs for p in pair if p is not None]
        _check_parameters(self.trained)
        self.dtype = self.trained[0].dtype
        absent = _ABSENT[self.dtype]
        self.parameters = [absent if p is None else p for pair in pairs for p in pair]
        self.present = [p is not None for pair in pairs for p in pair]
        _check_widths(self.parameters)
        self.n_in, self.n_out = self.parameters[0].shape[1], self.parameters[-2].shape[0]
        self.weights = sum(w.numel() for w in self.parameters[::2])
        self._guards = [_Parameter(p, p.data_ptr(), p.shape) for p in self.trained]

    def holds(self) -> bool:
        """Whether the model is still what it was read as."""
        for guards in (
            self._modules, self._layers, self._forwards, self._references, self._guards,
        ):  # fmt: skip
            for guard in guards:
                if not guard.holds():
                    return False
        return all(map(as_written, self._kinds))

    def _read(self, module: nn.Module | None, name: str) -> None:
        if not isinstance(module, nn.Module):
            raise NotServed(f"{name} is no module")
        kind = type(module)
        if has_hooks(module):
            raise NotServed(f"{name} has hooks, or a forward of its own")
        facts: tuple[str, ...] = ()
        if is_plain_linear(module):
            self._add_linear(module, name)
        elif is_plain(module, LinearReLU):
            self._add_linear(module, name)
            self._add_relu(name)
        elif is_plain(module, nn.ReLU):
            self._add_relu(name)
        elif is_plain(module, nn.Flatten):
            facts = ("start_dim", "end_dim")
            self._add_flatten(module, name)
        elif is_plain_dropout(module):
            facts = ("p", "training")
            if active_dropout(module) != 0.0:
                raise NotServed(f"{name} drops elements")
        elif kind in CONTAINERS and as_written(nn.Sequential):
            for key, child in module._modules.items():
                self._read(child, _named(name, key))
        elif not is_plain(module, nn.Identity):
            self._read_code(module, name)
        children = tuple(module._modules.items())
        values = tuple((fact, module.__dict__.get(fact)) for fact in facts)
        self._modules.append(_Module(module, kind, children, values))

    def _read_code(self, module: nn.Module, name: str) -> None:
        """A module of the user's, by the code of its forward."""
        kind = type(module)
        own = kind.__module__.split(".")[0] in ("torch", "fastattn")
        function = kind.forward
        if own or not isinstance(function, FunctionType):
            reason = f"{name} is {kind.__name__}, not a Linear, a ReLU or a chain of them"
            raise NotServed(reason, lasting=True)
        if (
            kind.__call__ is not CALL
            or kind.__getattr__ is not nn.Module.__getattr__
            or kind.__getattribute__ is not object.__getattribute__
        ):
            raise NotServed(f"{name} is called, or has its attributes, in a way of its own")
        try:
            chain = read_forward(function)
        except NotServed as error:
            raise NotServed(f"{name} ({kind.__name__}): {error}", lasting=True) from None
        self._forwards.append(_Forward(kind, function, function.__code__))
        self._references += chain.references
        for step in chain.steps:
            if step.child is not None:
                if hasattr(kind, step.child) or step.child in module.__dict__:
                    raise NotServed(f"{name} has an attribute {step.child} that is no child")
                self._read(module._modules.get(step.child), _named(name, step.child))
            elif step.reshape is not None:
                self._add_reshape(step.reshape, name)
            else:
                self._add_relu(name)

    def _add_linear(self, module: nn.Module, name: str) -> None:
        own = module.__dict__
        weight, bias = (own["_parameters"].get(key) for key in ("weight", "bias"))
        if weight is None or "weight" in own or "bias" in own:
            raise NotServed(f"{name} has no parameter `weight`, or hides it")
        if any(layer.linear is module for layer in self._layers):
            raise NotServed(f"{name} is called twice")
        self._layers.append(_Layer(module, weight, bias))
        self.relus.append(False)

    def _add_relu(self, name: str) -> None:
        if not self.relus:
            raise NotServed(f"{name} has a ReLU before the first linear layer")
        self.relus[-1] = True

    def _add_flatten(self, module: nn.Module, name: str) -> None:
        start, end = module.__dict__.get("start_dim"), module.__dict__.get("end_dim")
        if type(start) is not int or type(end) is not int:
            raise NotServed(f"{name} flattens dimensions that are no numbers")
        self._add_reshape(lambda x: x.flatten(start, end), name)

    def _add_reshape(self, reshape: Callable[[Tensor], Tensor], name: str) -> None:
        if self.relus:
            raise NotServed(f"{name} reshapes what lies between layers")
        self.reshapes.append(reshape)


def _named(name: str, child: str) -> str:
    return child if name == "the model" else f"{name}.{child}"


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    first = parameters[0]
    for p in parameters:
        if type(p) is not nn.Parameter or p.is_inference():
            raise NotServed("a parameter is no ordinary nn.Parameter")
        if p.device.type != "cpu":
            raise NotServed(f"the parameters are on {p.device.type}; the step is a CPU's")
        if p.dtype not in DTYPES or p.dtype != first.dtype:
            raise NotServed(f"the parameters are not all float32, or all float64: {p.dtype}")
        if p.layout is not torch.strided or not p.is_contiguous() or p.numel() == 0:
            raise NotServed("a parameter is not contiguous, or has no elements")
        if not p.requires_grad:
            raise NotServed("a parameter is frozen: requires_grad is False")
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise NotServed("a parameter has hooks")
    if share_memory(parameters):
        raise NotServed("parameters share memory")
    reason = backends.why_no_kernel("linear_relu", first.device, first.dtype)
    if reason is not None:
        raise NotServed(reason)


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether any two of the contiguous tensors have memory in common."""
    spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
    return any(a[0] < b[1] and b[0] < a[1] for a, b in combinations(spans, 2))


def _check_widths(parameters: Sequence[Tensor]) -> None:
    weights, biases = parameters[::2], parameters[1::2]
    fit = all(w.dim() == 2 for w in weights)
    fit = fit and all(a.shape[0] == b.shape[1] for a, b in pairwise(weights))
    fit = fit and all(
        b.shape in ((w.shape[0],), (0,)) for w, b in zip(weights, biases, strict=True)
    )
    if not fit:
        raise NotServed("the layers' widths do not fit together")
