"""A slice of the campaign of ``make fuzz``, and whether the campaign would see a fault."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import against_oracle
import campaign
import drawn
import fuzzed
import pytest
import torch

import fastattn
from fastattn import ops

pytestmark = pytest.mark.native

SLICES, EACH = 6, 130


@pytest.fixture(autouse=True)
def _the_former_number_of_threads():
    """Problems set the number of threads; the next test has the former number."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("part", range(SLICES))
def test_a_slice(part):
    found = campaign.run_here(11, range(part * EACH, (part + 1) * EACH), "this one")
    assert not found["failures"]


def test_every_class_is_drawn():
    seen = Counter()
    for number in range(4000):
        rng = drawn.Draw(11, number)
        for names in (drawn.DTYPES, drawn.LAYOUTS, drawn.MAGNITUDES, drawn.VALUES):
            rng.one("", names)
        seen.update(rng.classes)
    for number in range(1300):
        seen.update(fuzzed.draw(12, number).classes)
    for name in (
        *(f"op: {op}" for op in fuzzed.OPS),
        *(f"order: {n}" for n in (0, 1, 2)),
        *(f"threads: {n}" for n in (1, 2)),
        *(f"mask: {kind}" for kind in drawn.MASKS),
        *(f"a NaN in: {n}" for n in (0, 1, 2)),
        *(f"magnitude: {name}" for name in drawn.MAGNITUDES),
        *(f"layout: {name}" for name in drawn.LAYOUTS),
        *(f"no {what}" for what in ("queries", "keys", "heads", "batch", "inputs", "outputs")),
        *(f"no {what}" for what in ("rows", "columns")),
        *(f"activation: {name}" for name in ops.ACTIVATIONS),
        *(f"weights: {n}" for n in (1, 2, 3)),
        *(f"dropout_p: {p}" for p in drawn.DROPOUT),
        *(f"special: {name}" for name in drawn.SPECIAL),
        *(f"leading dimensions: {n}" for n in (0, 1, 2)),
        *(f"norm: {kind}" for kind in ("layer", "rms")),
        *(f"{name}: {there}" for name in ("residual", "weight", "bias") for there in (True, False)),
        *(f"option: {name}" for name in ("is_causal", "window_size", "softcap", "alibi_slopes")),
        *(f"option: {name}" for name in ("dropout_p", "scale")),
    ):
        assert seen[name], name


def _off(x: torch.Tensor) -> torch.Tensor:
    wrong = x.clone()
    if wrong.numel():
        wrong.view(-1)[-1] += 0.1 + wrong.view(-1)[-1].abs()
    return wrong


# What is wrong -> the op whose problems see it, the function, and what it does.
DEFECTS = {
    "the last element of attention": (
        "attention",
        "scaled_dot_product_attention",
        lambda f, *a, **k: (_off(f(*a, **k)[0].contiguous()), f(*a, **k)[1]),
    ),
    "the causal mask is lost": (
        "attention",
        "scaled_dot_product_attention",
        lambda f, *a, is_causal=False, **k: f(*a, **k),
    ),
    "the first key's gradient": (
        "attention",
        "scaled_dot_product_attention",
        lambda f, q, k, *a, **o: f(
            q, torch.cat([k[..., :1, :].detach(), k[..., 1:, :]], -2), *a, **o
        ),
    ),
    "the bias is lost": (
        "linear_relu",
        "linear_relu",
        lambda f, x, w, bias=None, **k: f(x, w, **k),
    ),
    "a rounding of one in a thousand": ("mlp", "mlp", lambda f, *a, **k: f(*a, **k) * 1.001),
    "an exception": ("mlp", "mlp", lambda f, *a, **k: 1 / 0),
    "another GELU": (
        "layers",
        "linear",
        lambda f, x, w, b, name, p: f(x, w, b, "gelu_tanh" if name == "gelu" else name, p),
    ),
    "dropout's factor is lost": (
        "layers",
        "linear",
        lambda f, x, w, b, name, p: f(x, w, b, name, p) * (1 - p),
    ),
    "one weight's share of the input's gradient": (
        "layers",
        "multi_linear",
        lambda f, x, *a: (f(x.detach(), *a)[0], *f(x, *a)[1:]),
    ),
    "the gate's slope": (
        "gated",
        "gated_mlp",
        lambda f, x, gate, *a, **k: f(x, gate + 1e-3 * (gate - gate.detach()), *a, **k),
    ),
    "the gate is the other": (
        "gated",
        "gated_mlp",
        lambda f, x, gate, up, down, a, b, **k: f(x, up, gate, down, b, a, **k),
    ),
    "the last element of an activation": (
        "activation",
        "activation_dropout",
        lambda f, *a: _off(f(*a)),
    ),
    "an infinity is lost": (
        "activation",
        "activation_dropout",
        lambda f, *a: f(*a).nan_to_num(math.nan),
    ),
    "another eps": (
        "norm",
        "dropout_add_norm",
        lambda f, eps, **k: f(eps=2 * eps, **k),
    ),
    "the mean's gradient": (
        "norm",
        "dropout_add_norm",
        lambda f, input, kind, **k: f(
            input=input - (input - input.detach()).sum(-1, keepdim=True) * 1e-3, kind=kind, **k
        ),
    ),
    "the sum is not the dropped one": (
        "norm",
        "dropout_add_norm",
        lambda f, input, **k: (f(input=input, **k)[0], input * 1.0),
    ),
}


def _fails(number: int) -> bool:
    return bool(campaign.run_here(11, [number], "this one")["failures"])


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_seen(defect, monkeypatch):
    kind, name, broken = DEFECTS[defect]
    whole = getattr(fastattn, name)

    def op(*args: object, backend: str, **options: object) -> object:
        if backend == "reference":
            return whole(*args, backend=backend, **options)
        return broken(lambda *a, **k: whole(*a, backend=backend, **k), *args, **options)

    numbers = [n for n in range(1400) if fuzzed.op_of(11, n) == kind][:60]
    with monkeypatch.context() as patch:
        patch.setattr(fastattn, name, op)
        seen = next((n for n in numbers if _fails(n)), None)
    assert seen is not None
    assert not _fails(seen)


def test_a_nan_on_one_side_is_seen():
    attention = next(n for n in range(100) if fuzzed.op_of(11, n) == "attention")
    problem = fuzzed.draw(11, attention)
    whole = problem.run
    problem.run = lambda leaves, backend: [
        x * (float("nan") if backend == "cpu" else 1.0) for x in whole(leaves, backend)
    ]
    assert against_oracle.run(problem)[0] is not None


def test_a_process_that_dies_is_a_failure(tmp_path, monkeypatch):
    """The problem that it was at is named; the others of the chunk are run."""
    script = tmp_path / "dies.py"
    script.write_text(
        "import json, os, sys\n"
        "start, stop = map(int, sys.argv[sys.argv.index('--numbers') + 1:][:2])\n"
        "for n in range(start, stop):\n"
        "    open(sys.argv[-1], 'w').write(str(n))\n"
        "    if n == 2: os.kill(os.getpid(), 11)\n"
        "found = ['a failure before it'] if start <= 1 < stop else []\n"
        "print(json.dumps({'classes': {'problems': stop - start}, 'worst': {}, "
        "'failures': found}))\n"
    )
    monkeypatch.setattr(campaign, "HERE", script)
    lines = list(campaign.run_chunk(7, 0, "generic", 5))
    assert sum(line["classes"]["problems"] for line in lines) == 5
    failures = [failure for line in lines for failure in line["failures"]]
    died = "--seed 7 --only 2 --isa generic  the process died: SIGSEGV"
    assert failures == [died, "a failure before it"]


def test_a_campaign_goes_on_where_it_was_ended(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(campaign, "CHUNK", 3)
    monkeypatch.setattr(campaign, "instruction_sets", lambda: ["generic"])
    tried: list[int] = []

    def chunk(seed: int, chunk: int, isa: str, count: int) -> list[dict]:
        tried.append(chunk)
        failures = ["--seed 1 --only 4  wrong"] if chunk == 1 else []
        return [{"classes": {"problems": count}, "worst": {"x": 0.5}, "failures": failures}]

    monkeypatch.setattr(campaign, "run_chunk", chunk)
    path = tmp_path / "state.json"
    campaign.run(1, 7, path, 1)
    state = campaign.run(1, 12, path, 1)
    assert tried == [0, 1, 2, 2, 3]
    assert state.chunks == [0, 1, 2, 3]
    assert json.loads(path.read_text())["failures"] == state.failures
    assert "1 failures" in campaign.table(state)
    with pytest.raises(SystemExit, match="expected a file of seed 2, got 1"):
        campaign.run(2, 3, path, 1)
