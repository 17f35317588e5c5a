"""Random small models through torch.compile(backend="fastattn"), beside the models themselves,
before and after random edits. A compiled model stays compiled when it is edited: what the edit
changes must be seen by Dynamo's guards, and what the backend fused must not outlive it."""

from __future__ import annotations

import random
import warnings
from collections import Counter

import pytest
import side_by_side
import torch
from compiled import torchs_draws  # noqa: F401
from random_blocks import BLOCKS
from random_edits import EDITS, DoesNotApply, edit
from random_models import ROWS, Draw, Net, random_model
from test_patch_random import compare, kernel_calls, results  # noqa: F401

import fastattn
from fastattn import _products, functional
from fastattn.integrations.graph import activations

pytestmark = side_by_side.MARKS

SEEDS, MODELS, EDITS_EACH = 3, 25, 2
# Ways of calling that Dynamo follows; it knows nothing of functions that are replaced under it.
CALLS = ("plainly", "without gradients", "in inference mode", "under autocast")
WAYS = ("the whole", "the whole, with more")


def compiled(net: Net) -> Net:
    return torch.compile(net, backend="fastattn")


def run_models(seed: int, models: int) -> Counter[str]:
    """How often each kind of edit and call occurred, and what was fused."""
    draw = Draw(random.Random(seed))
    warnings.simplefilter("error", fastattn.FastAttnWarning)  # a graph that is left as it is
    for _ in range(models):
        torch.compiler.reset()  # else the next model meets the limit of compilations of a method
        again = draw.rng.getstate()
        stock, dtype = random_model(draw, BLOCKS)
        draw.rng.setstate(again)
        ours, _ = random_model(Draw(draw.rng), BLOCKS)
        run_model(draw, stock, ours, dtype)
        for entry in fastattn.compile_report().swapped:
            draw.seen[f"fused: {entry.after.removeprefix('fastattn ')}"] += 1
    return draw.seen


def run_model(draw: Draw, stock: Net, ours: Net, dtype: torch.dtype) -> None:
    x = torch.randn(2, ROWS, draw.width, dtype=dtype)
    history: list[object] = [stock]
    call = compiled(ours)
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
            edited = edit(ours, name, seed)
            if edited is not ours:
                ours, call = edited, compiled(edited)
        how = draw.one_of("call", CALLS, {"plainly": 3})
        way = draw.one_of("way", WAYS)
        history += [how, way]
        expected = results(stock, x, how, [way], 0)
        draw.seen["errors"] += isinstance(expected, Exception)
        low = torch.bfloat16 if how == "under autocast" and dtype != torch.float64 else dtype
        compare(results(call, x, how, [way], 0), expected, str(low)[6:], history)


@pytest.fixture
def products_win(monkeypatch) -> None:
    """Layers on one input are one call on every processor."""
    monkeypatch.setattr(_products, "why_swap", lambda *_: "it was said to be faster")
    monkeypatch.setattr(_products, "why_torchs", lambda *_: None)


FUSED = ("mlp", "linear_relu", "torch's on fastattn scaled_dot_product_attention", "linear",
         "gated_mlp", "multi_linear", "activation_dropout", "dropout_add_norm")  # fmt: skip


@pytest.mark.parametrize("seed", range(SEEDS))
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)  # else torch looks at no new hooks
def test_random_models(seed, kernel_calls, torchs_draws, products_win):  # noqa: F811
    seen = run_models(seed, MODELS)
    assert sum(seen[f"fused: {name}"] > 0 for name in FUSED) > len(FUSED) - 2, seen
    assert kernel_calls["linear_relu"] > MODELS / 5
    assert kernel_calls["mlp"] > MODELS / 5
    assert kernel_calls["scaled_dot_product_attention"] > MODELS / 5
    assert sum(seen[f"edit: {name}"] > 0 for name in EDITS) > len(EDITS) / 2, seen
    assert seen["errors"] < MODELS / 4


# A defect of each kind that the rules could have.
MUTANTS = {
    "other readers are not seen": (activations, "_other_readers", lambda x, inside: []),
    "a sum is lost": (
        functional,
        "dropout_add_norm",
        lambda x, residual, *rest, f=functional.dropout_add_norm, **o: f(x, None, *rest, **o),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
def test_a_defect_turns_it_red(mutant, monkeypatch, kernel_calls, torchs_draws):  # noqa: F811
    home, name, broken = MUTANTS[mutant]
    monkeypatch.setattr(home, name, broken)
    with pytest.raises(AssertionError):
        run_models(0, MODELS)
