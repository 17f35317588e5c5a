"""Random small models, with patch and without, side by side, before and after random edits, in
every way of calling them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
import side_by_side
import torch
from random_edits import CALLS, EDITS, DoesNotApply, edit
from random_models import BETWEEN, DTYPES, MASKED, PARTS, ROWS, Draw, Net, random_model
from torch import Tensor, nn

import fastattn
from fastattn import _products, functional
from fastattn.integrations import activations, sequential
from fastattn.nn import _plain, attention

pytestmark = side_by_side.MARKS

SEEDS, MODELS = 8, 250
EDITS_EACH = 3
# The largest error of a tensor's norm, results' and gradients'. A kernel rounds 16-bit results
# elsewhere than torch does, and a ReLU that has its sign from the rounding moves a gradient far.
TOLERANCE = {
    "float64": (1e-9, 1e-9),
    "float32": (1e-4, 1e-4),
    "float16": (0.02, 0.3),
    "bfloat16": (0.15, 0.6),
}
Found = tuple[list[Tensor], list[Tensor]] | Exception  # results and gradients, or the error


# Errors of operations that torch needs and the kernels do without: the backward of a ReLU whose
# result was changed in place, and promotion of float16 under an autocast to bfloat16.
TORCHS = ("modified by an inplace operation", "at::autocast::prioritize")

WAYS: dict[str, Callable[[Net, Tensor, int], Iterable[Tensor]]] = {
    "the whole": lambda net, x, i: net(x),
    "the whole, with more": lambda net, x, i: net(x, x),
    "another method": lambda net, x, i: [net.features(x)],
    "a part alone": lambda net, x, i: [net.parts[i](x)],
    "layers of a part alone": lambda net, x, i: [m(x) for m in list(net.parts[i].children())[:2]],
    "a slice of a part": lambda net, x, i: [net.parts[i][: len(net.parts[i]) // 2](x)],
}


def results(net: Net, x: Tensor, call: str, ways: list[str], i: int) -> Found:
    """What the ways in give, and the gradients; or the error."""
    net.zero_grad()
    x = x.clone()  # which a ReLU in place may change
    torch.default_generator.manual_seed(3)
    try:
        with CALLS[call]():
            outs = [out for way in ways for out in WAYS[way](net, x, i)]
            if any(out.requires_grad for out in outs):
                (sum(out.square().sum() for out in outs) / ROWS).backward()
    except Exception as error:
        return error
    outs = [out.detach().clone() for out in (*outs, x)]
    return outs, [p.grad for p in net.parameters() if p.grad is not None]


def compare(actual: Found, expected: Found, dtype: str, history: object) -> None:
    if isinstance(expected, Exception) and any(words in str(expected) for words in TORCHS):
        return
    if isinstance(expected, Exception) or isinstance(actual, Exception):
        assert type(actual) is type(expected), (history, str(expected))
        return
    for ours, stock, tolerance in zip(actual, expected, TOLERANCE[dtype], strict=True):
        assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in stock], history
        largest = max((float(b.nan_to_num().norm()) for b in stock), default=0.0)
        for a, b in zip(ours, stock, strict=True):
            if torch.equal(a, b):
                continue
            assert torch.equal(a.isnan(), b.isnan()), history
            a, b = (x.nan_to_num().double() for x in (a, b))
            apart, allowed = float((a - b).norm()), tolerance * (float(b.norm()) + 0.1 * largest)
            assert apart <= allowed, (dtype, history, apart, allowed)


def run_models(seed: int, models: int) -> Counter[str]:
    """How often each kind of model, edit and call occurred."""
    draw = Draw(random.Random(seed))
    for _ in range(models):
        again = draw.rng.getstate()
        stock, dtype = random_model(draw)
        draw.rng.setstate(again)
        ours, _ = random_model(Draw(draw.rng))  # a deep copy shares the parametrized classes
        for entry in fastattn.patch(ours).swapped:
            draw.seen[f"swap: {entry.before}"] += 1
        if draw.rng.random() < 0.3:
            call_straight(draw, ours)
        side_by_side_for_a_while(draw, stock, ours, dtype)
    return draw.seen


def call_straight(draw: Draw, model: Net) -> None:
    """Every input of the Sequentials and blocks counts as small, and layers are called straight."""
    for module in model.modules():
        if _plain.SMALL_BELOW in vars(module):
            vars(module)[_plain.SMALL_BELOW] = 1 << 62
            draw.seen["called straight"] += 1


def side_by_side_for_a_while(draw: Draw, stock: Net, ours: Net, dtype: torch.dtype) -> None:
    x = torch.randn(2, ROWS, draw.width, dtype=dtype)
    history: list[object] = [stock]
    for step in range(EDITS_EACH + 1):
        if step > 0:
            name = draw.one_of("tried", EDITS)
            seed = draw.rng.randrange(2**31)
            try:
                stock = edit(stock, name, seed)
            except DoesNotApply:
                continue
            draw.seen[f"edit: {name}"] += 1
            history.append(name)
            ours = edit(ours, name, seed)
            if name == "patched again":
                fastattn.patch(ours)
        compare_calls(draw, stock, ours, x, history)
    fastattn.unpatch(ours)
    assert [type(m).__name__ for m in ours.modules()] == [type(m).__name__ for m in stock.modules()]
    compare_calls(draw, stock, ours, x, history)


def compare_calls(draw: Draw, stock: Net, ours: Net, x: Tensor, history: list[object]) -> None:
    call = draw.one_of("call", CALLS, {"plainly": 10})
    i = draw.rng.randrange(len(stock.parts))
    sliced = isinstance(stock.parts[i], nn.Sequential)
    alone = draw.one_of("way", [*WAYS][2 : 6 if sliced else 4])
    ways = [draw.one_of("way", [*WAYS][:2]), alone]
    history += [call, *ways, i]
    expected = results(stock, x, call, ways, i)
    draw.seen["errors"] += isinstance(expected, Exception)
    low = torch.bfloat16 if call == "under autocast" and x.dtype != torch.float64 else x.dtype
    compare(results(ours, x, call, ways, i), expected, str(low)[6:], history)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Linears are swapped in 16 bits on every processor; and which kernels the drop-ins call."""
    monkeypatch.setattr(_products, "_LACKING", frozenset((torch.float16, torch.bfloat16)))
    monkeypatch.setattr(_products, "LEAST_HALF", 0)
    calls = Counter()
    for name in ("linear_relu", "mlp", "scaled_dot_product_attention"):
        function = getattr(functional, name)

        def counted(*args, name=name, function=function, **options):
            calls[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(functional, name, counted)
    return calls


MET = [
    *(f"part: {name}" for name in PARTS),
    *(f"between: {name}" for name in BETWEEN),
    *(f"dtype: {name}" for name in DTYPES),
    *(f"edit: {name}" for name in EDITS),
    *(f"call: {name}" for name in CALLS),
    *(f"way: {name}" for name in WAYS),
    *(f"encoder masked: {name}" for name in MASKED),
    *(f"attention masked: {name}" for name in MASKED),
    *(f"swap: {name}" for name in ("Sequential", "Linear", "MultiheadAttention")),
    *(f"swap: Transformer{name}" for name in ("Encoder", "EncoderLayer")),
    "swap: FeedForward",
    "swap: Calling",
    "a shared layer",
    "a Sequential inside",
    "tied weights",
    "parametrized before patch",
    "hooked before patch",
    "norm first",
    "nested tensors at inference",
    "added keys",
    "attention weights wanted",
    "a side output",
    "called straight",
]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_models(seed, kernel_calls):
    seen = run_models(seed, MODELS)
    assert not [name for name in MET if not seen[name]], "the generator does not reach these"
    assert all(kernel_calls[name] > MODELS for name in ("linear_relu", "mlp")), kernel_calls
    assert kernel_calls["scaled_dot_product_attention"] > MODELS, kernel_calls
    assert seen["swap: Sequential"] > MODELS
    assert seen["errors"] < MODELS / 4  # of about 5 calls of each model


class _Now(dict):
    """The forwards as they are now, replaced or not."""

    def __getitem__(self, kind: type[nn.Module]) -> object:
        return kind.forward


# A defect of each kind that drop-ins could have, in the one place that keeps it out.
MUTANTS = {
    "hooks are not seen": (_plain, "has_hooks", lambda module: False),
    "global hooks are not seen": (_plain, "any_global_hook", lambda: False),
    "replaced forwards are not seen": (_plain, "FORWARDS", {}),
    "replaced functions are not seen": (_plain, "_FUNCTIONS", {}),
    "a subclass counts as plain": (
        sequential,
        "is_plain_linear",
        lambda m: isinstance(m, nn.Linear) and not _plain.has_hooks(m),
    ),
    "replaced forwards are not seen in small calls": (
        sequential,
        "FORWARDS",
        _Now(),
    ),
    "hooks on an activation in a block are not seen": (
        activations,
        "fused_activation",
        lambda activation: "relu" if "relu" in str(activation).lower() else None,
    ),
    "function modes are not seen": (sequential, "unobserved", lambda: True),
    "masks are lost": (attention.MultiheadAttention, "_merge", lambda *a: None),
    "a bias is lost": (
        functional,
        "mlp",
        lambda x, weights, biases, f=functional.mlp: f(x, weights, [None] * len(biases)),
    ),
    "a rounding of one millionth": (
        functional,
        "linear_relu",
        lambda x, weight, bias, f=functional.linear_relu: f(x, weight, bias) + 1e-6,
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_defect_turns_it_red(mutant, kernel_calls, monkeypatch):
    home, name, broken = MUTANTS[mutant]
    monkeypatch.setattr(home, name, broken)
    with pytest.raises(AssertionError):
        run_models(0, MODELS)
