"""The optimizers that a step of training knows: their hyperparameters and their states."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import chain
from operator import is_
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from fastattn.functional._served import ordinary
from fastattn.functional._torch_internals import has_step_hooks, step_beneath_schedulers
from fastattn.ops import OPTIMIZERS, Rule
from fastattn.training._network import Network, share_memory
from fastattn.training._unknown import NotServed

Group = dict[str, Any]
_NUMBERS = frozenset((float, int, bool))


def _sgd(group: Group) -> Rule:
    return Rule(
        group["lr"], group["weight_decay"], group["momentum"], group["dampening"],
        variant=group["nesterov"], maximize=group["maximize"],
    )  # fmt: skip


def _adam(group: Group) -> Rule:
    beta1, beta2 = group["betas"]
    return Rule(
        group["lr"], group["weight_decay"], beta1, beta2, group["eps"], group["amsgrad"],
        group["maximize"], group["decoupled_weight_decay"],
    )  # fmt: skip


def _rmsprop(group: Group) -> Rule:
    return Rule(
        group["lr"], group["weight_decay"], group["momentum"], group["alpha"], group["eps"],
        group["centered"], group["maximize"],
    )  # fmt: skip


def _sgd_states(rule: Rule) -> tuple[str, ...]:
    return ("momentum_buffer",) if rule.momentum != 0 else ()


def _adam_states(rule: Rule) -> tuple[str, ...]:
    return ("step", "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if rule.variant else ()))


def _rmsprop_states(rule: Rule) -> tuple[str, ...]:
    buffer = ("momentum_buffer",) if rule.momentum > 0 else ()
    return ("step", "square_avg", *buffer, *(("grad_avg",) if rule.variant else ()))


_KINDS: dict[
    type[Optimizer],
    tuple[str, str, Callable[[Group], Rule], Callable[[Rule], tuple[str, ...]]],
] = {
    SGD: ("sgd", "sgd.py", _sgd, _sgd_states),
    Adam: ("adam", "adam.py", _adam, _adam_states),
    AdamW: ("adam", "adam.py", _adam, _adam_states),
    RMSprop: ("rmsprop", "rmsprop.py", _rmsprop, _rmsprop_states),
}


def _is_torchs(function: object, *files: str) -> bool:
    code = getattr(function, "__code__", None)
    name = getattr(code, "co_filename", "").replace("\\", "/")
    return any(name.endswith(f"torch/optim/{file}") for file in files)


def _zero_grad() -> object:
    """``Optimizer.zero_grad``, or None where it is not torch's."""
    inner = inspect.unwrap(Optimizer.zero_grad)
    return Optimizer.zero_grad if _is_torchs(inner, "optimizer.py") else None


_ZERO_GRAD = _zero_grad()
_STEPS: dict[type[Optimizer], object] = {}  # the steps that were found to be torch's


def _steps_as_written(kind: type[Optimizer]) -> bool:
    """Whether ``kind.step`` is the function of torch's own file, within torch's own wrappers."""
    step: Any = kind.step
    if _STEPS.get(kind) is step:
        return True
    function = step
    while hasattr(function, "__wrapped__"):
        if not _is_torchs(function, "optimizer.py"):
            return False
        function = function.__wrapped__
    if not isinstance(function, FunctionType) or not _is_torchs(function, _KINDS[kind][1]):
        return False
    _STEPS[kind] = step
    return True


def _same(found: list[Any], kept: list[Any]) -> bool:
    """Whether both hold the same objects. What is kept lives on, so that nothing else can take its
    address."""
    return len(found) == len(kept) and all(map(is_, found, kept))


class Updates:
    """How an optimizer changes the parameters of a network, looked at before each step."""

    number: int  # of the optimizer, in the op
    rules: Tensor  # [2 L, 8]
    states: list[Tensor]

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.states = []
        self._network: Network | None = None
        self._members: list[list[int]] = []  # the groups, by their parameters' ids
        self._groups: list[int] = []  # of each of the op's parameters
        self._names: list[tuple[str, ...]] = []  # of the states, for each trained parameter
        # What the rules and the states were read from.
        self._of_rules: list[Any] = []
        self._homes: list[Any] | None = None
        self._of_states: list[Any] = []

    def prepare(self, network: Network) -> None:
        """Brings rules and states up to date; raises NotServed where torch's step is to run."""
        optimizer = self.optimizer
        kind = type(optimizer)
        if kind not in _KINDS:
            raise NotServed(f"the optimizer is {kind.__name__}")
        if not _steps_as_written(kind) or has_step_hooks(optimizer):
            raise NotServed("the optimizer's step has hooks, or is not torch's")
        if step_beneath_schedulers(optimizer) is not kind.step:
            raise NotServed("the optimizer's step was replaced")
        if "zero_grad" in vars(optimizer) or kind.zero_grad is not _ZERO_GRAD:
            raise NotServed("the optimizer's zero_grad was replaced")
        groups = optimizer.param_groups
        members = [list(map(id, group["params"])) for group in groups]
        if network is not self._network or members != self._members:
            self._match(network, members)
        of_rules = [value for group in groups for value in group.values()]
        if not _same(of_rules, self._of_rules):
            self._read_rules(network, groups)
            self._of_rules = of_rules
        self._take_states(network)

    def _match(self, network: Network, members: list[list[int]]) -> None:
        """Finds each parameter's group."""
        self._network = None
        group_of = {p: g for g, ids in enumerate(members) for p in ids}
        trained = {id(p) for p in network.trained}
        if sum(map(len, members)) != len(group_of) or group_of.keys() != trained:
            raise NotServed("the optimizer's parameters are not exactly the model's")
        self._groups = [group_of.get(id(p), 0) for p in network.parameters]
        self._of_rules = []
        self._members, self._network = members, network

    def _read_rules(self, network: Network, groups: list[Group]) -> None:
        self._of_rules, self._homes = [], None
        name, _, read, names_of = _KINDS[type(self.optimizer)]
        for group in groups:
            if group.get("capturable") or group.get("differentiable"):
                raise NotServed("the optimizer is capturable or differentiable")
            if not isinstance(group.get("betas", ()), tuple):  # a list may change
                raise NotServed("a hyperparameter is no number")
        rules = [read(group) for group in groups]
        if not all(_NUMBERS.issuperset(map(type, rule)) for rule in rules):
            raise NotServed("a hyperparameter is no number")
        self.number = OPTIMIZERS.index(name)
        self.rules = torch.tensor(rules, dtype=torch.float64, device="cpu")[self._groups]
        of_each = [names_of(rules[g]) for g in self._groups]
        self._names = [n for n, there in zip(of_each, network.present, strict=True) if there]

    def _take_states(self, network: Network) -> None:
        state = self.optimizer.state
        homes = [*state, *state.values()]
        if self._homes is not None and _same(homes, self._homes):
            of_states = list(chain.from_iterable(map(dict.values, state.values())))
            if _same(of_states, self._of_states):
                return
        self._homes, self.states = None, []
        for p, names in zip(network.trained, self._names, strict=True):
            if names:
                own = state.get(p)
                if not own:
                    raise NotServed("the optimizer's state is not there yet: torch's step makes it")
                self.states += [own.get(name) for name in names]
        self._check_states(network, self.states)
        if all(isinstance(own, dict) for own in state.values()):
            self._homes = homes
            self._of_states = list(chain.from_iterable(map(dict.values, state.values())))

    def _check_states(self, network: Network, found: list[Tensor]) -> None:
        left = iter(found)
        for p, names in zip(network.trained, self._names, strict=True):
            for name in names:
                tensor = next(left)
                fits = isinstance(tensor, Tensor) and ordinary(tensor) and tensor.is_cpu
                if fits and name == "step":
                    fits = tensor.numel() == 1 and tensor.dtype in (torch.float32, torch.float64)
                elif fits:
                    fits = tensor.shape == p.shape and tensor.dtype == p.dtype
                if not fits or not tensor.is_contiguous() or tensor.is_inference():
                    raise NotServed(f"the optimizer's state has an unusual {name}")
        if share_memory([*network.trained, *found]):
            raise NotServed("the optimizer's states share memory")
