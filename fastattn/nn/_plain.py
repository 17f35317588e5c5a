"""What a drop-in module looks at, at each call, before a kernel stands in for torch's code."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastattn.functional._torch_internals import any_global_hook, has_hooks

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")

# Where ``fastattn.patch`` keeps the class that a module had.
FORMER_CLASS = "_fastattn_former_class"
# Where it keeps the number of elements below which an input of a Sequential, or of a block, runs
# torch's code.
SMALL_BELOW = "_fastattn_small_below"
# Where ``patch(model, dropout=False)`` notes that a module's dropout must draw what torch draws.
TORCHS_DRAWS = "_fastattn_torchs_draws"
# Where it keeps whether an encoder skips its padding.
UNPAD = "_fastattn_unpad"


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` is ``kind.forward`` and nothing else: the exact type, as torch
    wrote it, without hooks."""
    return type(module) is kind and not has_hooks(module) and as_written(kind)


def fused_activation(activation: object) -> str | None:
    """The activation's name in ``fastattn.linear``, where it is one of torch's functions or
    modules, as torch wrote it and without hooks; None where no kernel may stand in for it."""
    if isinstance(activation, nn.Module):
        if is_plain(activation, nn.ReLU):
            return "relu"
        if is_plain(activation, nn.SiLU):
            return "silu"
        if is_plain(activation, nn.GELU):
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(activation.approximate))
        return None
    for function, (name, kind) in _OF_ACTIVATION.items():
        if activation is function:
            return name if function is torch.relu or as_written(kind) else None
    return None


def no_global_hooks() -> bool:
    """Whether a child's call may be skipped: no hook is registered for all modules, and
    ``nn.Module.__call__`` is as torch wrote it."""
    return not any_global_hook() and nn.Module.__call__ is CALL


def as_written(kind: type[nn.Module]) -> bool:
    """Whether nobody has replaced ``kind.forward``, or a function that it calls."""
    return kind.forward is FORWARDS.get(kind, kind.forward) and all(
        getattr(F, name) is function for name, function in _FUNCTIONS.get(kind, ())
    )


def was_swapped(module: nn.Module) -> bool:
    """Whether ``fastattn.patch`` gave the module its class: it then refuses nothing by itself, and
    torch's code raises torch's errors."""
    return FORMER_CLASS in module.__dict__


def keeps_torchs_draws(module: nn.Module) -> bool:
    """Whether ``patch(model, dropout=False)`` swapped the module."""
    return TORCHS_DRAWS in module.__dict__


def to_torch(module: M) -> M:
    """Gives a swapped module its former class again."""
    if was_swapped(module):
        module.__class__ = module.__dict__.pop(FORMER_CLASS)
        for fact in (SMALL_BELOW, TORCHS_DRAWS, UNPAD):
            module.__dict__.pop(fact, None)
    return module


def unpickled(
    made: Callable[[type[nn.Module]], type[nn.Module] | None], former: type[nn.Module]
) -> nn.Module:
    """An empty module of the class that ``made`` derives from the former one; of the former class
    where another version of the model's library has nothing to derive it from."""
    kind = made(former) or former
    return kind.__new__(kind)


def scripted_as(torchs: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """``__prepare_scriptable__`` of a class whose meaning in TorchScript is ``torchs.forward``.

    torch.jit.script calls it and compiles the class of what it returns. A swapped module gets its
    former class again; a module that was built as ours stays, and a twin with its parameters and
    children is compiled.
    """

    def prepare(module: nn.Module) -> nn.Module:
        if was_swapped(module):
            return to_torch(module)
        kind = type(module)
        if "__prepare_scriptable__" not in vars(kind):
            raise TypeError(
                f"torch.jit.script: expected fastattn's own class, which it compiles as "
                f"{torchs.__name__}, got the subclass {kind.__qualname__}; torch.jit.trace takes it"
            )
        twin = torchs.__new__(torchs)
        twin.__dict__.update(vars(module))
        twin._modules = dict(module._modules)  # torch.jit.script puts the children's twins there
        return twin

    return prepare


def run_torchs(module: nn.Module, forward: Callable[..., R], *args: object) -> R:
    """``forward(*args)``, torch's own for ``module``. A symbolic trace records one call of the
    module instead, as it does where the class is torch's, unless it is a trace of that module."""
    proxy: Any = next((x for x in args if isinstance(x, fx.Proxy)), None)
    if proxy is None or module is proxy.tracer.root:
        return forward(*args)
    path = proxy.tracer.path_of_module(module)
    return proxy.tracer.create_proxy("call_module", path, args, {})


def _torchs(function: Any, home: str) -> Any:
    """The function, or None where it is not the one that torch's file ``home`` defines."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return function  # a builtin
    return function if code.co_filename.replace("\\", "/").endswith(home) else None


_HOMES: dict[Any, str] = {
    nn.Linear: "torch/nn/modules/linear.py",
    nn.ReLU: "torch/nn/modules/activation.py",
    nn.GELU: "torch/nn/modules/activation.py",
    nn.SiLU: "torch/nn/modules/activation.py",
    nn.LayerNorm: "torch/nn/modules/normalization.py",
    nn.Dropout: "torch/nn/modules/dropout.py",
    nn.Sequential: "torch/nn/modules/container.py",
    nn.Flatten: "torch/nn/modules/flatten.py",
    nn.Identity: "torch/nn/modules/linear.py",
    nn.CrossEntropyLoss: "torch/nn/modules/loss.py",
    nn.MSELoss: "torch/nn/modules/loss.py",
    nn.MultiheadAttention: "torch/nn/modules/activation.py",
    nn.TransformerEncoderLayer: "torch/nn/modules/transformer.py",
    nn.TransformerEncoder: "torch/nn/modules/transformer.py",
}
# An entry is None where the function was replaced before fastattn was imported: the entry then
# equals no function, and torch's code runs.
CALL = _torchs(nn.Module.__call__, "torch/nn/modules/module.py")
FORWARDS = {kind: _torchs(kind.forward, home) for kind, home in _HOMES.items()}


def _functions(*names: str) -> tuple[tuple[str, object], ...]:
    return tuple((name, _torchs(getattr(F, name), "torch/nn/functional.py")) for name in names)


RELU = _torchs(F.relu, "torch/nn/functional.py")
CROSS_ENTROPY = _torchs(F.cross_entropy, "torch/nn/functional.py")
MSE_LOSS = _torchs(F.mse_loss, "torch/nn/functional.py")
_OF_ACTIVATION = {
    torch.relu: ("relu", nn.ReLU),
    F.relu: ("relu", nn.ReLU),
    F.gelu: ("gelu", nn.GELU),
    F.silu: ("silu", nn.SiLU),
}
_FUNCTIONS = {
    nn.Linear: _functions("linear"),
    nn.ReLU: _functions("relu"),
    nn.GELU: _functions("gelu"),
    nn.SiLU: _functions("silu"),
    nn.Dropout: _functions("dropout"),
    nn.LayerNorm: _functions("layer_norm"),
    nn.CrossEntropyLoss: _functions("cross_entropy"),
    nn.MSELoss: _functions("mse_loss"),
    nn.MultiheadAttention: _functions(
        "linear", "multi_head_attention_forward", "scaled_dot_product_attention"
    ),
}
