"""A patched model means what it meant: every call, edit, mode and tool gives what it gives without
patch, results and errors alike."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import nn as fnn

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

Make = Callable[[], nn.Module]
Run = Callable[[nn.Module], object]


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(inplace=True),
        nn.LayerNorm(16), nn.Linear(16, 3), nn.ReLU(),
    )  # fmt: skip


def pair(make: Make) -> tuple[nn.Module, nn.Module]:
    stock = make()
    ours = copy.deepcopy(stock)
    assert fastattn.patch(ours).swapped
    return stock, ours


def outcome(run: Run, model: nn.Module) -> object:
    torch.manual_seed(1)
    try:
        return run(model)
    except Exception as error:
        return error


def assert_same(make: Make, run: Run, edit: Run | None = None) -> None:
    """The same result, or the same error, with patch and without; ``edit`` comes after patch."""
    stock, ours = pair(make)
    for model in (stock, ours):
        torch.manual_seed(2)
        if edit is not None:
            edit(model)
    compare(outcome(run, ours), outcome(run, stock))


def compare(actual: object, expected: object) -> None:
    if isinstance(expected, Exception):
        assert type(actual) is type(expected), f"{actual!r}, without patch {expected!r}"
        assert str(actual)[:60] == str(expected)[:60]
    elif isinstance(expected, Tensor | tuple):
        if isinstance(expected, Tensor) and expected.is_nested:
            actual, expected = (t.to_padded_tensor(0.0) for t in (actual, expected))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    else:
        assert actual == expected


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Doubles(torch.Tensor):
    """A tensor subclass with a meaning of its own for F.linear."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            return 2 * out if func is F.linear else out


# --- inputs ---------------------------------------------------------------------------------------

INPUTS = {
    "rows": X,
    "one row": X[0],
    "no rows": X[:0],
    "a lazy minus": torch._neg_view(X),
    "integers": X.long(),
    "float64": X.double(),
    "bfloat16": X.bfloat16(),
    "complex": X.to(torch.complex64),
    "another width": X[:, :7],
    "a number": torch.tensor(1.0),
    "None": None,
    "a list": [1.0],
    "sparse": X.to_sparse(),
    "nested": torch.nested.nested_tensor([X, X[:2]]),
    "jagged": torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged),
    "subclass": X.as_subclass(Doubles),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_inputs(name, autocast):
    def run(model: nn.Module) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(INPUTS[name])
        return out if out.dtype != torch.bfloat16 else str((out.dtype, out.shape, type(out)))

    assert_same(stack, run)


def test_sparse_features_train():
    sparse = (X * (X > 0.5)).to_sparse()

    def run(model: nn.Module) -> object:
        model(sparse).square().sum().backward()
        return tuple(p.grad for p in model.parameters())

    assert_same(stack, run)


# --- edits after patch ----------------------------------------------------------------------------


def set_weight(value: Tensor) -> Run:
    def edit(model: nn.Module) -> None:
        del model[2].weight
        model[2].weight = value

    return edit


def twice_the_output(module: nn.Module) -> Run:
    return module.register_forward_hook(lambda m, args, out: 2 * out)


def another_width(model: nn.Module) -> None:
    model[0], model[2] = nn.Linear(8, 24), nn.Linear(24, 16)


EDITS = {
    "another activation": lambda m: m.__setitem__(1, nn.GELU()),
    "another width": lambda m: another_width(m),
    "a layer more": lambda m: m.append(nn.Linear(3, 2)),
    "a layer between": lambda m: m.insert(1, nn.Tanh()),
    "a layer less": lambda m: m.__delitem__(1),
    "a hook on a Linear": lambda m: twice_the_output(m[2]),
    "a hook on a ReLU": lambda m: twice_the_output(m[3]),
    "a pre-hook": lambda m: m[3].register_forward_pre_hook(lambda m, args: (args[0] - 1,)),
    "a hook on the whole": twice_the_output,
    "a forward of a layer": lambda m: setattr(m[1], "forward", torch.tanh),
    "a forward of the whole": lambda m: setattr(m, "forward", torch.tanh),
    "weight norm": lambda m: parametrizations.weight_norm(m[2]),
    "pruned": lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
    "a weight of a subclass": set_weight(torch.ones(16, 16).as_subclass(Doubles)),
    "a weight of one dimension": set_weight(torch.ones(16)),
    "a bias that broadcasts": lambda m: setattr(m[0], "bias", nn.Parameter(torch.ones(1))),
    "no weight": lambda m: delattr(m[0], "weight"),
    "a weight in float64": lambda m: m[2].double(),
    "one layer twice": lambda m: m.__setitem__(2, nn.Sequential(m[2], m[2])),
    "compiled layer": lambda m: m[1].compile(backend="eager"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edits(name):
    assert_same(stack, lambda m: m(X), EDITS[name])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["nn.Linear", "nn.ReLU", "nn.Sequential", "F.linear", "F.relu"])
def test_replaced_code_is_run(monkeypatch, what, when):
    """Tools that replace a forward or a function of torch's, for all modules."""
    home, name = (F, what[2:]) if what.startswith("F.") else (getattr(nn, what[3:]), "forward")
    whole = getattr(home, name)

    def replace() -> None:
        monkeypatch.setattr(home, name, lambda *a, **k: 2 * whole(*a, **k))

    model = stack()
    if when == "before":
        replace()
    ours = copy.deepcopy(model)
    fastattn.patch(ours)
    if when == "after":
        replace()
    torch.testing.assert_close(ours(X), model(X))
    monkeypatch.undo()
    torch.testing.assert_close(ours(X), model(X))


# --- modes and tools ------------------------------------------------------------------------------


class DoublesReLU(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is F.relu else out


def in_mode(mode: Callable[[], object]) -> Run:
    def run(model: nn.Module) -> object:
        with mode():
            return model(X)

    return run


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model(X).sum().backward()
    return counter.get_total_flops()


def fake(model: nn.Module) -> object:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return tuple(model(torch.empty(5, 8)).shape)


def operations(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes]


def per_sample(model: nn.Module) -> object:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).sum()

    return vmap(grad(loss), (None, 0))(dict(model.named_parameters()), X)["0.weight"]


def recomputed(model: nn.Module) -> object:
    checkpoint(model, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    return model[0].weight.grad


def globally_hooked(model: nn.Module) -> object:
    """Which modules a hook for all modules sees, and what."""
    seen: list[Tensor] = []
    names = {module: name for name, module in model.named_modules()}
    order: list[str] = []

    def hook(module: nn.Module, args: object, out: object) -> None:
        order.append(names[module])
        seen.append(out.detach().sum() if isinstance(out, Tensor) else out[0].detach().sum())

    handle = register_module_forward_hook(hook)
    try:
        model(X if isinstance(model[0], nn.Linear) else Y)
    finally:
        handle.remove()
    compare_values.append((order, seen))
    return order


compare_values: list[tuple[list[str], list[Tensor]]] = []


def default_device(model: nn.Module) -> object:
    with torch.device("cpu"):
        return model(X)


TOOLS = {
    "hooks for all modules": globally_hooked,
    "a function mode": in_mode(DoublesReLU),
    "the default device": default_device,
    "flops": flops,
    "fake tensors": fake,
    "inference mode": in_mode(torch.inference_mode),
    "fx": lambda m: operations(fx.symbolic_trace(m).graph),
    "make_fx": lambda m: operations(make_fx(m)(X).graph),
    "make_fx, symbolic": lambda m: operations(make_fx(m, tracing_mode="symbolic")(X).graph),
    "export": lambda m: operations(torch.export.export(m, (X,)).graph),
    "jit.trace": lambda m: torch.jit.trace(m, X)(X[:2]),
    "jit.script": lambda m: torch.jit.script(m)(X),
    "compile": lambda m: torch.compile(m, backend="aot_eager", fullgraph=True)(X),
    "per-sample gradients": per_sample,
    "forward mode": lambda m: jvp(m, (X,), (torch.ones_like(X),))[1],
    "hessian": lambda m: hessian(lambda x: m(x).square().sum())(X[0]),
    "checkpoint": recomputed,
    "quantize_dynamic": lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear})(X),
    "class of a slice": lambda m: [type(m[:2]), type(m + m), len(m[1:])],
}


@pytest.mark.parametrize("name", TOOLS)
def test_tools(name):
    compare_values.clear()
    assert_same(stack, TOOLS[name])
    for (_, ours), (_, stock) in zip(compare_values[::2], compare_values[1::2], strict=True):
        torch.testing.assert_close(ours, stock)


def test_the_meta_device():
    assert_same(lambda: stack().to("meta"), lambda m: tuple(m(X.to("meta")).shape))


# --- encoders -------------------------------------------------------------------------------------

Y = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


def encoder(**options) -> Make:
    def make() -> nn.Module:
        torch.manual_seed(5)
        options_ = {"dropout": 0.0, "batch_first": True, **options}
        layer = nn.TransformerEncoderLayer(8, 2, 16, **options_)
        model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return model

    return make


def trained(model: nn.Module, *args: object, **options: object) -> object:
    return model(*args, **options)


def inferred(model: nn.Module, *args: object, **options: object) -> object:
    with torch.no_grad():
        return model.eval()(*args, **options)


CALLS = {
    "plain": ((Y,), {}),
    "padded": ((Y,), {"src_key_padding_mask": PADDED}),
    "causal": ((Y, CAUSAL), {}),
    "both": ((Y, CAUSAL, PADDED), {}),
    "hint": ((Y, CAUSAL), {"is_causal": True}),
    "hint without mask": ((Y,), {"is_causal": True}),
    "one for each head": ((Y, CAUSAL.expand(4, 5, 5)), {}),
    "float padding": ((Y,), {"src_key_padding_mask": -PADDED.float()}),
    "float mask": ((Y, -CAUSAL.float()), {}),
    "mixed masks": ((Y, -CAUSAL.float(), PADDED), {}),
    "integer mask": ((Y, CAUSAL.int()), {}),
    "mask of another shape": ((Y, CAUSAL[:3]), {}),
    "padding of another shape": ((Y, None, PADDED[:, :3]), {}),
    "unbatched": ((Y[0],), {}),
    "float64": ((Y.double(),), {}),
    "another width": ((Y[..., :4],), {}),
    "empty": ((Y[:0],), {}),
    "nested": ((torch.nested.nested_tensor([Y[0], Y[1, :3]]),), {}),
    "meta": ((Y.to("meta"),), {}),
}
ENCODERS = {
    "relu": encoder(),
    "gelu, norm first": encoder(activation="gelu", norm_first=True),
    "nn.GELU('tanh')": encoder(activation=nn.GELU("tanh")),
    "nn.ReLU": encoder(activation=nn.ReLU()),
    "torch.relu": encoder(activation=torch.relu),
}


@pytest.mark.parametrize("run", [trained, inferred])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_calls(kind, call, run):
    args, options = CALLS[call]
    if call == "meta":
        assert_same(ENCODERS[kind], lambda m: tuple(run(m, *args, **options).shape))
    else:
        assert_same(ENCODERS[kind], lambda m: run(m, *args, **options))


def each_layer(edit: Callable[[nn.Module], object]) -> Run:
    return lambda model: [edit(layer) for layer in model.layers]


class Takes(nn.Module):
    """Attention that adds its masks, as it may when torch's layer calls it."""

    batch_first, in_proj_bias, _qkv_same_embed_dim, num_heads = True, None, True, 2

    def forward(
        self, q, k, v, attn_mask=None, key_padding_mask=None, need_weights=False, is_causal=False
    ):
        scores = q @ k.transpose(1, 2)
        if attn_mask is not None:
            scores = scores + attn_mask
        if key_padding_mask is not None:
            scores = scores + key_padding_mask[:, None]
        return scores.softmax(-1) @ v, None


LAYER_EDITS = {
    "attention of another kind": each_layer(lambda m: setattr(m, "self_attn", Takes())),
    "another bias": each_layer(lambda m: setattr(m.linear1, "bias", nn.Parameter(torch.ones(16)))),
    "an adapter": each_layer(lambda m: setattr(m, "dropout2", nn.Linear(8, 8))),
    "a wrapped linear2": each_layer(lambda m: setattr(m, "linear2", nn.Sequential(m.linear2))),
    "a hook on attention": each_layer(
        lambda m: m.self_attn.register_forward_hook(lambda a, b, out: (2 * out[0], None))
    ),
    "a hook on linear1": each_layer(lambda m: twice_the_output(m.linear1)),
    "dropout kept on": each_layer(lambda m: m.dropout.__init__(0.5)),
    "no norm": lambda m: setattr(m, "norm", None),
    "frozen": lambda m: m.requires_grad_(False),
}  # fmt: skip


@pytest.mark.parametrize("call", ["plain", "padded", "both"])
@pytest.mark.parametrize("name", LAYER_EDITS)
def test_encoder_edits(name, call):
    args, options = CALLS[call]
    assert_same(ENCODERS["relu"], lambda m: m(*args, **options), LAYER_EDITS[name])


def test_dropout_layers_switched_on_at_inference():
    def edit(model: nn.Module) -> None:
        for module in model.eval().modules():
            module.train(isinstance(module, nn.Dropout))

    def run(model: nn.Module) -> object:
        with torch.no_grad():
            return model(Y)

    assert_same(encoder(dropout=0.5), run, edit)


class PlainLayer(nn.TransformerEncoderLayer):
    """Adds its masks to the scores, and keeps what it was given."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        self.given = (src_mask, src_key_padding_mask)
        scores = src @ src.transpose(1, 2) + src_mask + src_key_padding_mask[:, None]
        return self.linear2(F.gelu(self.linear1(scores.softmax(-1) @ src)))


@pytest.mark.parametrize("make", [nn.TransformerEncoder, fnn.TransformerEncoder])
def test_a_layer_of_the_users_gets_float_masks(make):
    torch.manual_seed(0)
    model = make(PlainLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    stock = nn.TransformerEncoder(model.layers[0], 2, enable_nested_tensor=False)
    fastattn.patch(model)
    torch.testing.assert_close(model(Y, CAUSAL, PADDED), stock(Y, CAUSAL, PADDED))
    mask, padding = model.layers[1].given
    assert mask.dtype == padding.dtype == torch.float32
    assert torch.equal(mask == -torch.inf, CAUSAL)
    assert torch.equal(padding == -torch.inf, PADDED)


@pytest.mark.parametrize("run", [trained, inferred])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 6}])
def test_attention_calls(options, run):
    def make() -> nn.Module:
        torch.manual_seed(2)
        return nn.MultiheadAttention(8, 2, batch_first=True, **options)

    k, v = torch.ones(2, 5, options.get("kdim", 8)).cumsum(1), torch.randn(2, 5, 8)
    calls = [
        ((Y, k, v), {}),
        ((Y, k, v), {"need_weights": False}),
        ((Y, k, v), {"average_attn_weights": False}),
        ((Y, k, v), {"is_causal": True}),
        ((Y, k, v), {"is_causal": True, "attn_mask": CAUSAL, "need_weights": False}),
        ((Y, k[:, :4], v), {}),
        ((Y[None], k, v), {}),
        ((Y, k, None), {}),
        ((Y, k, v), {"key_padding_mask": PADDED.int()}),
        ((Y, k, v), {"key_padding_mask": PADDED, "attn_mask": -CAUSAL.float()}),
    ]
    for args, call in calls:
        assert_same(make, lambda m, args=args, call=call: run(m, *args, **call))


ENCODER_TOOLS = {
    "hooks for all modules": lambda m: globally_hooked(nn.Sequential(m)),
    "fx": lambda m: operations(fx.symbolic_trace(nn.Sequential(m)).graph),
    "export": lambda m: operations(torch.export.export(m.eval(), (Y,)).graph),
    "jit.trace": lambda m: torch.jit.trace(m.eval(), Y, check_trace=False)(Y),
    "jit.script": lambda m: torch.jit.script(m.eval())(Y),
}


@pytest.mark.parametrize("name", ENCODER_TOOLS)
def test_encoder_tools(name):
    assert_same(ENCODERS["relu"], ENCODER_TOOLS[name])


def test_scripting_leaves_a_model_that_runs_and_can_be_unpatched():
    stock, ours = pair(ENCODERS["relu"])
    torch.jit.script(ours)
    torch.testing.assert_close(ours(Y), stock(Y))
    fastattn.unpatch(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]


# --- other processes ------------------------------------------------------------------------------


def test_a_process_that_only_unpickles():
    model = nn.Sequential(ENCODERS["relu"](), *stack())
    assert fastattn.patch(model).swapped
    file = io.BytesIO()
    torch.save((model, Y, model(Y).detach()), file)
    code = (
        "import io, sys, torch\n"
        "model, x, out = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)\n"
        "torch.testing.assert_close(model(x).detach(), out)\n"
        "print(type(model).__module__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], input=file.getvalue(), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout.decode().strip() == "fastattn.integrations.sequential"
