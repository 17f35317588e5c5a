"""What people do with models beyond calling them: with patch and without, side by side."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import side_by_side
import torch
from patched_models import MODELS, batch, gradients, gradients_in_a_batch, loss, stack
from side_by_side import Run, assert_same
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune, spectral_norm, stateless, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

pytestmark = side_by_side.MARKS


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if type(m) is nn.Linear]


def each_linear(change: Callable[[nn.Linear], object]) -> Run:
    def run(model: nn.Module) -> object:
        for linear in linears(model):
            change(linear)
        outs = model(batch()), model(batch())
        loss(outs[1]).backward()
        return (*outs, *gradients(model))

    return run


def steps(model: nn.Module, kind: type = torch.optim.SGD, **options: object) -> Tensor:
    optimizer = kind(model.parameters(), lr=0.01, **options)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(batch())).backward()
        optimizer.step()
    return model(batch())


def step_in_backward(model: nn.Module) -> Tensor:
    def step(p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(0.01 * p.grad)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        loss(model(batch())).backward()
    return model(batch())


def averaged(model: nn.Module) -> Tensor:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        steps(model)
        average.update_parameters(model)
    return average(batch())


def ensemble(model: nn.Module) -> object:
    members = [copy.deepcopy(model) for _ in range(3)]
    for i, member in enumerate(members):
        for p in member.parameters():
            p.data.mul_(1 + 0.1 * i)
    parameters, buffers = stack_module_state(members)
    base = copy.deepcopy(model).to("meta")

    def out(p: object, b: object) -> Tensor:
        return functional_call(base, (p, b), (batch(),))

    slopes = vmap(grad(lambda p: loss(functional_call(model, p, (batch(),)))))(parameters)
    return vmap(out)(parameters, buffers), slopes


def pruned(model: nn.Module) -> object:
    weights = [(m, "weight") for m in linears(model)]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=0.4)
    out = model(batch())
    for module, name in weights:
        prune.remove(module, name)
    return out, model(batch())


def counted(model: nn.Module) -> list[str]:
    """As counters do that put a hook on each module."""
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: called.append(name))
    model(batch())
    return called


def flops(model: nn.Module) -> object:
    with FlopCounterMode(display=False) as counter:
        model(batch()).sum().backward()
    return {name: {str(op): n for op, n in ops.items()} for name, ops in
            counter.get_flop_counts().items()}  # fmt: skip


class Functions(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def watched(mode: type) -> Run:
    def run(model: nn.Module) -> list[str]:
        with mode() as seen:
            model(batch())
        return seen.names

    return run


def scaled(model: nn.Module) -> object:
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(model.parameters(), lr=0.01)
    scaler.scale(loss(model(batch()))).backward()
    scaler.step(optimizer)
    scaler.update()
    return model(batch()), scaler.get_scale()


def checkpointed(model: nn.Module) -> object:
    x = batch().clone().requires_grad_()
    layers = getattr(model, "layers", model)
    loss(checkpoint_sequential(list(layers), 2, x, use_reentrant=False)).backward()
    return x.grad, *gradients(model)


def with_state_dict_hooks(model: nn.Module) -> object:
    model.register_state_dict_post_hook(lambda m, state, *a: state.update(extra=torch.ones(1)))
    model.register_load_state_dict_pre_hook(lambda m, state, *a: state.pop("extra"))
    state = model.state_dict()
    model.load_state_dict(dict(state))
    return dict(state)


def in_a_fork(model: nn.Module) -> object:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    model.share_memory()
    child = context.Process(target=lambda: queue.put(model(batch()).detach().numpy()))
    child.start()
    out = torch.from_numpy(queue.get(timeout=60))
    child.join()
    return out


def in_threads(model: nn.Module) -> object:
    with ThreadPoolExecutor(4) as threads:
        return tuple(threads.map(model, [batch()] * 8))


def backward_on_cpu(model: nn.Module) -> object:
    with torch.autograd.graph.save_on_cpu():
        out = loss(model(batch()))
    out.backward()
    return gradients(model)


def backward_with_hooks(model: nn.Module) -> object:
    for p in model.parameters():
        p.register_hook(lambda g: 2 * g)
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        loss(model(batch())).backward()
    return gradients(model)


def backward_twice(model: nn.Module) -> object:
    out = loss(model(batch()))
    out.backward(retain_graph=True)
    out.backward()
    return gradients(model)


def backward_once_too_often(model: nn.Module) -> object:
    out = loss(model(batch()))
    out.backward()
    out.backward()
    return None


def converted_by_swapping(model: nn.Module) -> object:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double()(batch().double())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def compiled_in_place(model: nn.Module) -> object:
    model.compile(backend="aot_eager")
    loss(model(batch())).backward()
    return gradients(model)


def loaded_with_assign(model: nn.Module) -> object:
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=True)
    return empty(batch())


def hooks_in_order(model: nn.Module) -> object:
    seen: list[object] = []
    model.register_forward_pre_hook(lambda m, args: seen.append("before"))
    model.register_full_backward_pre_hook(lambda m, grads: seen.append("before the backward"))
    for name, module in model.named_modules():
        module.register_full_backward_hook(
            lambda m, grads, outs, name=name: seen.append((name, outs[0].shape))
        )
    loss(model(batch().clone().requires_grad_())).backward()
    return seen


USES = {
    "hooks in order": hooks_in_order,
    "strides": lambda m: [
        m(x).stride() for x in (batch(), batch().transpose(1, 2).clone().transpose(1, 2))
    ],
    "no rows": lambda m: (m(batch()[:0]), m(batch()[:, :0])),
    "one NaN": lambda m: (
        m(torch.where(batch()[0, 0, 0] == batch(), torch.nan, batch())).isnan().sum()
    ),
    "an array": lambda m: m(batch().numpy()),
    "what needs a gradient": lambda m: [
        m(batch()).requires_grad,
        m.requires_grad_(False)(batch()).is_leaf,
    ],
    "an average of weights": averaged,
    "an ensemble": ensemble,
    "functional_call": lambda m: stateless.functional_call(
        m, {name: 2 * p for name, p in m.named_parameters()}, (batch(),)
    ),
    "pruned": pruned,
    "weight norm of old": each_linear(weight_norm),
    "spectral norm of old": each_linear(spectral_norm),
    "spectral norm": each_linear(parametrizations.spectral_norm),
    "hooks that count": counted,
    "flops of each module": flops,
    "a function mode's list": watched(Functions),
    "a dispatch mode's list": watched(Operations),
    "the representation": repr,
    "foreach": lambda m: steps(m, foreach=True),
    "fused": lambda m: steps(m, fused=True),
    "steps in the backward": step_in_backward,
    "a scaler": scaled,
    "checkpoints": checkpointed,
    "state_dict hooks": with_state_dict_hooks,
    "in a fork": in_a_fork,
    "in threads": in_threads,
    "saved on the CPU": backward_on_cpu,
    "hooks of gradients": backward_with_hooks,
    "backward twice": backward_twice,
    "backward once too often": backward_once_too_often,
    "gradients in a batch": gradients_in_a_batch,
    "converted by swapping": converted_by_swapping,
    "compiled in place": compiled_in_place,
    "loaded with assign": loaded_with_assign,
    "a shallow copy": lambda m: copy.copy(m)(batch()),
    "initialized by type": lambda m: m.apply(
        lambda c: nn.init.constant_(c.weight, 0.1) if type(c) is nn.Linear else None
    )(batch()),
    "exported": lambda m: torch.export.export(m, (batch(),)).module()(batch()),
    "scripted and frozen": lambda m: torch.jit.freeze(torch.jit.script(m.eval()))(batch()),
    "views": lambda m: (
        m(batch().transpose(0, 1)),
        m(batch().flip(0)),
        m(batch()[:1].expand(3, 5, 8)),
    ),
    "an inference tensor": lambda m: m(torch.inference_mode()(batch().clone)()),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("model", MODELS)
def test_uses(model, use):
    assert_same(MODELS[model], USES[use])


def test_tangents_of_parameters():
    """Of a stack alone: torch has no forward mode of attention."""

    def run(model: nn.Module) -> object:
        p = dict(model.named_parameters())
        ones = {name: torch.ones_like(x) for name, x in p.items()}
        return jvp(lambda p: functional_call(model, p, (batch(),)), (p,), (ones,))[1]

    assert_same(stack, run)
