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
from fastattn.functional import _served
from fastattn.nn import _plain

pytestmark = side_by_side.MARKS

SEEDS, MODELS = 8, 250
EDITS_EACH = 3
# The largest error of a tensor's norm. A kernel rounds 16-bit results elsewhere than torch does.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 0.03, "bfloat16": 0.2}


WAYS: dict[str, Callable[[Net, Tensor, int], Iterable[Tensor]]] = {
    "the whole": lambda net, x, i: net(x),
    "the whole, with more": lambda net, x, i: net(x, x),
    "another method": lambda net, x, i: [net.features(x)],
    "a part alone": lambda net, x, i: [net.parts[i](x)],
    "layers of a part alone": lambda net, x, i: [m(x) for m in list(net.parts[i].children())[:2]],
    "a slice of a part": lambda net, x, i: [net.parts[i][: len(net.parts[i]) // 2](x)],
}


def results(net: Net, x: Tensor, call: str, ways: list[str], i: int) -> list[Tensor] | Exception:
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
    return [*outs, *(p.grad for p in net.parameters() if p.grad is not None)]


def compare(
    actual: list[Tensor] | Exception, expected: list[Tensor] | Exception, dtype: str, history: object
) -> None:
    if isinstance(expected, Exception) and "modified by an inplace operation" in str(expected):
        return  # of a ReLU's result, which torch saves for the backward and fastattn does not
    if isinstance(expected, Exception) or isinstance(actual, Exception):
        assert type(actual) is type(expected), (history, str(expected))
        return
    assert [x.shape for x in actual] == [x.shape for x in expected]
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    largest = max(float(b.nan_to_num().norm()) for b in expected)
    for a, b in zip(actual, expected, strict=True):
        if not torch.equal(a, b):
            assert torch.equal(a.isnan(), b.isnan()), history
            a, b = (x.nan_to_num().double() for x in (a, b))
            allowed = TOLERANCE[dtype] * (float(b.norm()) + 0.1 * largest)
            apart = float((a - b).norm())
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
        side_by_side_for_a_while(draw, stock, ours, dtype)
    return draw.seen


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
