"""The optimizers that a step of training knows: their hyperparameters and their states."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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


def _steps_as_written(kind: type[Optimizer], file: str) -> bool:
    """Whether ``kind.step`` is the function of torch's file, within torch's own wrappers."""
    step: Any = kind.step
    if _STEPS.get(kind) is step:
        return True
    function = step
    while hasattr(function, "__wrapped__"):
        if not _is_torchs(function, "optimizer.py"):
            return False
        function = function.__wrapped__
    if not isinstance(function, FunctionType) or not _is_torchs(function, file):
        return False
    _STEPS[kind] = step
    return True


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
        self._group_rules: list[Rule] = []
        self._names: list[tuple[str, ...]] = []  # of the states, for each trained parameter

    def prepare(self, network: Network) -> None:
        """Brings rules and states up to date; raises NotServed where torch's step is to run."""
        kind = type(self.optimizer)
        known = _KINDS.get(kind)
        if known is None:
            raise NotServed(f"the optimizer is {kind.__name__}")
        name, file, read, _ = known
        if not _steps_as_written(kind, file) or has_step_hooks(self.optimizer):
            raise NotServed("the optimizer's step has hooks, or is not torch's")
        if step_beneath_schedulers(self.optimizer) is not kind.step:
            raise NotServed("the optimizer's step was replaced")
        if "zero_grad" in vars(self.optimizer) or kind.zero_grad is not _ZERO_GRAD:
            raise NotServed("the optimizer's zero_grad was replaced")
        self.number = OPTIMIZERS.index(name)
        groups = self.optimizer.param_groups
        members = [list(map(id, group["params"])) for group in groups]
        if network is not self._network or members != self._members:
            self._match(network, members)
        rules = [read(group) for group in groups]
        for group, rule in zip(groups, rules, strict=True):
            if not _NUMBERS.issuperset(map(type, rule)):  # a tensor may equal a number
                raise NotServed("a hyperparameter is no number")
            if group.get("capturable") or group.get("differentiable"):
                raise NotServed("the optimizer is capturable or differentiable")
        if rules != self._group_rules:
            self._set_rules(network, rules)
        self._take_states(network)

    def _match(self, network: Network, members: list[list[int]]) -> None:
        """Finds each parameter's group."""
        self._network = None
        group_of = {p: g for g, ids in enumerate(members) for p in ids}
        trained = {id(p) for p in network.trained}
        if sum(map(len, members)) != len(group_of) or group_of.keys() != trained:
            raise NotServed("the optimizer's parameters are not exactly the model's")
        self._groups = [group_of.get(id(p), 0) for p in network.parameters]
        self._group_rules, self.states = [], []
        self._members, self._network = members, network

    def _set_rules(self, network: Network, rules: list[Rule]) -> None:
        of_groups = torch.tensor(rules, dtype=torch.float64, device="cpu")
        self.rules = of_groups[self._groups]
        names = _KINDS[type(self.optimizer)][3]
        of_each = [names(rules[g]) for g in self._groups]
        self._names = [n for n, there in zip(of_each, network.present, strict=True) if there]
        self._group_rules = rules

    def _take_states(self, network: Network) -> None:
        found: list[Tensor] = []
        state = self.optimizer.state
        for p, names in zip(network.trained, self._names, strict=True):
            if names:
                own = state.get(p)
                if not own:
                    raise NotServed("the optimizer's state is not there yet: torch's step makes it")
                found += [own.get(name) for name in names]
        if list(map(id, found)) != list(map(id, self.states)):
            self._check_states(network, found)
            self.states = found

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
