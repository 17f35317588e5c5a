"""What may happen to a model after ``patch``, and how it may be called. An edit is made alike in
the stock model and in the patched one: both get the same random numbers."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from random_models import (
    Adapter,
    Net,
    Symmetric,
    Twice,
    less_a_half,
    more_a_half,
    twice_the_gradient,
)
from torch import nn
from torch.nn.modules import module as all_modules
from torch.nn.utils import parametrizations, parametrize, prune


class DoesNotApply(Exception):
    """The model has nothing for this edit; nothing was changed."""


# --- what an edit is made to ----------------------------------------------------------------------


def pick(rng: random.Random, found: list[str]) -> str:
    if not found:
        raise DoesNotApply
    return rng.choice(found)


def names_of(net: nn.Module, *kinds: str) -> list[str]:
    """By the class's name, which patch keeps for Linears; a parametrized class has another."""
    return [n for n, m in net.named_modules() if type(m).__name__ in kinds]


def place(net: Net, name: str) -> tuple[nn.Module, str]:
    parent, _, child = name.rpartition(".")
    return net.get_submodule(parent), child


def layer(net: Net, rng: random.Random) -> nn.Module:
    return net.get_submodule(pick(rng, names_of(net, "Linear", "ReLU")))


def square_linear(net: Net, rng: random.Random) -> str:
    found = []
    for name in names_of(net, "Linear"):
        weight = net.get_submodule(name)._parameters.get("weight")  # None where it is pruned
        if weight is not None and weight.shape[0] == weight.shape[1]:
            found.append(name)
    return pick(rng, found)


def like(net: Net, module: nn.Module) -> nn.Module:
    return module.to(next(net.parameters()).dtype)


def sequential(net: Net, rng: random.Random) -> nn.Sequential:
    found = names_of(net, "Sequential", "FusedSequential")
    return net.get_submodule(pick(rng, found))


# --- the edits ------------------------------------------------------------------------------------


def another_layer(net: Net, rng: random.Random) -> None:
    name = square_linear(net, rng)
    owner, child = place(net, name)
    width = net.get_submodule(name).in_features
    setattr(owner, child, like(net, nn.Linear(width, width)))


def another_activation(net: Net, rng: random.Random) -> None:
    owner, child = place(net, pick(rng, names_of(net, "ReLU")))
    setattr(owner, child, nn.Tanh())


def an_adapter_around(net: Net, rng: random.Random) -> None:
    name = square_linear(net, rng)
    owner, child = place(net, name)
    old = net.get_submodule(name)
    setattr(owner, child, like(net, Adapter(old, old.in_features)))


def a_forward_on_an_instance(net: Net, rng: random.Random) -> None:
    net.get_submodule(
        pick(rng, [*names_of(net, "ReLU"), square_linear(net, rng)])
    ).forward = Twice()


def hooks_removed(net: Net, rng: random.Random) -> None:
    hooked = [m for m in net.modules() if m._forward_hooks or m._forward_pre_hooks]
    if not hooked:
        raise DoesNotApply
    for module in hooked:
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def parametrizations_removed(net: Net, rng: random.Random) -> None:
    name = pick(rng, [n for n, m in net.named_modules() if parametrize.is_parametrized(m)])
    parametrize.remove_parametrizations(net.get_submodule(name), "weight")


def weights_tied(net: Net, rng: random.Random) -> None:
    one, other = square_linear(net, rng), square_linear(net, rng)
    if one == other:
        raise DoesNotApply
    net.get_submodule(one).weight = net.get_submodule(other).weight


def new_parameters(net: Net, rng: random.Random) -> None:
    linear = net.get_submodule(square_linear(net, rng))
    linear.weight = nn.Parameter(linear.weight.detach() * 1.5)
    linear.bias = None if rng.random() < 0.3 else linear.bias


def frozen(net: Net, rng: random.Random) -> None:
    module = net.get_submodule(pick(rng, [n for n, _ in net.named_modules() if n]))
    for p in module.parameters():
        p.requires_grad_(not p.requires_grad)


def trained_in_part(net: Net, rng: random.Random) -> None:
    module = net.get_submodule(rng.choice([n for n, _ in net.named_modules()]))
    module.train(not module.training)


def a_step(net: Net, rng: random.Random) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9)


def loaded(net: Net, rng: random.Random) -> None:
    net.load_state_dict({k: 1.1 * v for k, v in net.state_dict().items()})


def a_layer_more(net: Net, rng: random.Random) -> None:
    stretch = sequential(net, rng)
    stretch.insert(rng.randint(0, len(stretch)), nn.ReLU())


def a_layer_less(net: Net, rng: random.Random) -> None:
    stretch = sequential(net, rng)
    if len(stretch) < 2:
        raise DoesNotApply
    del stretch[rng.randrange(len(stretch))]


def pruned(net: Net, rng: random.Random) -> None:
    prune.l1_unstructured(net.get_submodule(square_linear(net, rng)), "weight", 0.3)


def copied(net: Net, copy_of: Callable[[Net], Net]) -> Net:
    try:
        return copy_of(net)
    except (
        RuntimeError,
        AttributeError,
    ) as error:  # parametrized modules are not pickled, pruned ones not copied
        raise DoesNotApply from error  # which the test lets pass for the stock model alone


EDITS: dict[str, Callable[[Net, random.Random], Net | None]] = {
    "another layer": another_layer,
    "another activation": another_activation,
    "an adapter around": an_adapter_around,
    "a forward on an instance": a_forward_on_an_instance,
    "a forward hook": lambda net, rng: layer(net, rng).register_forward_hook(less_a_half),
    "a pre-hook": lambda net, rng: layer(net, rng).register_forward_pre_hook(more_a_half),
    "a backward hook": lambda net, rng: layer(net, rng).register_full_backward_hook(
        twice_the_gradient
    ),
    "hooks removed": hooks_removed,
    "weight norm": lambda net, rng: parametrizations.weight_norm(
        net.get_submodule(square_linear(net, rng))
    ),
    "a parametrization": lambda net, rng: parametrize.register_parametrization(
        net.get_submodule(square_linear(net, rng)), "weight", Symmetric()
    ),
    "parametrizations removed": parametrizations_removed,
    "pruned": pruned,
    "weights tied": weights_tied,
    "new parameters": new_parameters,
    "frozen": frozen,
    "an early exit": lambda net, rng: setattr(net, "early", not net.early),
    "trained or not": lambda net, rng: net.train(not net.training) and None,
    "trained in part": trained_in_part,
    "a step": a_step,
    "loaded": loaded,
    "a layer more": a_layer_more,
    "a layer less": a_layer_less,
    "a deep copy": lambda net, rng: copied(net, copy.deepcopy),
    "pickled": lambda net, rng: copied(net, lambda m: pickle.loads(pickle.dumps(m))),
    "patched again": lambda net, rng: None,  # the test patches ours
}


def edit(net: Net, name: str, seed: int) -> Net:
    """The edited model, ``net`` itself or a copy of it. Raises DoesNotApply."""
    torch.default_generator.manual_seed(seed)
    made = EDITS[name](net, random.Random(seed))
    return made if isinstance(made, Net) else net


# --- the calls ------------------------------------------------------------------------------------


def _third_more(module: nn.Module, args: object, out: object) -> object:
    return out * 1.3 if isinstance(module, nn.Linear | nn.ReLU) else None


def _third_before(module: nn.Module, args: tuple) -> object:
    return (args[0] * 1.3, *args[1:]) if isinstance(module, nn.Linear | nn.ReLU) else None


@contextmanager
def hooked_everywhere(register: Callable, hook: Callable) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def replaced(home: object, name: str) -> mock._patch:
    former = getattr(home, name)
    return mock.patch.object(home, name, lambda *a, **k: 1.3 * former(*a, **k))


class Watched(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 1.3 * out if func in (F.relu, F.linear) else out


CALLS: dict[str, Callable[[], object]] = {
    "plainly": nullcontext,
    "without gradients": torch.no_grad,
    "in inference mode": torch.inference_mode,
    "under autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "beneath a global hook": lambda: hooked_everywhere(
        all_modules.register_module_forward_hook, _third_more
    ),
    "beneath a global pre-hook": lambda: hooked_everywhere(
        all_modules.register_module_forward_pre_hook, _third_before
    ),
    "with Linear.forward replaced": lambda: replaced(nn.Linear, "forward"),
    "with ReLU.forward replaced": lambda: replaced(nn.ReLU, "forward"),
    "with F.linear replaced": lambda: replaced(F, "linear"),
    "with F.relu replaced": lambda: replaced(F, "relu"),
    "in a function mode": Watched,
}
