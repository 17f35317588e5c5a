"""What the check runs on a GPU, run on the CPU: the CPU's kernels answer the same calls."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from gpu import worker
from gpu.cases import PROFILES, Attention, Linear, SecondOrder, Step
from gpu.clock import Clock
from gpu.hardware import Bench
from gpu.results import Results, packed
from gpu.smoke import KERNELS, AttentionSize, cases_of, judge

from fastattn import _extension, ops

pytestmark = pytest.mark.native
CPU = torch.device("cpu")


def small(case) -> bool:
    if isinstance(case.size, AttentionSize):
        return case.size.seq_q < 1000
    return math.prod(case.size) < 2e8


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gets_its_problem_and_passes(kernel):
    cases = [case for case in cases_of(kernel) if small(case)]
    if kernel == "linear_forward256":
        cases = [case._replace(size=(300, 200, 256)) for case in cases_of(kernel)[:1]]
        cases = [case._replace(size=type(cases_of(kernel)[0].size)(*case.size)) for case in cases]
    assert cases
    for case in cases:
        results = Results(CPU).of(kernel, case)
        assert set(results) == set(KERNELS[kernel].tensors)
        for name, (actual, expected) in results.items():
            verdict = judge(actual, expected, case.dtype)
            assert verdict.passed, (case.name, name, verdict)
            assert not judge(np.zeros_like(actual), expected, case.dtype).passed


def test_a_backward_does_not_run_the_forward(monkeypatch):
    """A kernel is judged alone: what hangs is what is named."""

    def forbidden(*_):
        raise AssertionError("the forward ran")

    for name in ("attention_forward", "linear_relu_forward", "mlp_forward"):
        monkeypatch.setattr(ops, name, forbidden)
    for kernel in (
        "attention_backward64", "linear_grad_input", "linear_grad_weight", "mlp_backward",
    ):  # fmt: skip
        assert Results(CPU).of(kernel, cases_of(kernel)[0])


@pytest.mark.parametrize("columns", [8, 19, 300])
def test_packed_bits_are_the_ops(columns):
    x, w = torch.randn(7, 5), torch.randn(columns, 5)
    out, bits = ops.linear_relu_forward(x, w, None)
    assert torch.equal(packed(out > 0), bits)


@pytest.fixture(scope="module")
def bench():
    return Bench("cpu", {"cuda": "cpu", "triton": "cpu"})


@pytest.mark.parametrize(
    ("case", "passes"),
    [
        (Attention(1, 2, 100, 64, "causal"), ["forward"]),
        (Attention(2, 2, 100, 64, "padding", backward=True), ["backward"]),
        (Attention(1, 2, 100, 64, "bias", "float32", True), ["backward"]),
        (Attention(1, 2, 100, 64, "bool"), ["forward"]),
        (SecondOrder(1, 2, 100, 64, "causal"),
         ["forward", "tangent", "backward", "second derivative"]),
        (Linear(50, 64, 128), ["forward", "dX", "dW"]),
        (Step(64), ["step"]),
    ],
    ids=lambda x: getattr(x, "name", None),
)  # fmt: skip
@pytest.mark.parametrize("ours", ["cuda", "triton"])
def test_ours_is_checked_and_timed(bench, ours, case, passes):
    rows = bench.measure(ours, case)
    assert [row["pass"] for row in rows] == passes
    for row in rows:
        assert float(row["ms"]) > 0
        assert float(row["error"]) < 0.02


@pytest.mark.parametrize(
    ("peer", "case"),
    [("flash", Attention(1, 2, 100, 64, "causal", backward=True)),
     ("eager", Linear(50, 64, 128)), ("eager", Step(64))],
    ids=str,
)  # fmt: skip
def test_a_peer_is_timed(bench, peer, case):
    assert all("error" not in row and float(row["ms"]) > 0 for row in bench.measure(peer, case))


@pytest.mark.parametrize(
    "case",
    [Attention(1, 2, 100, 64, backward=True), SecondOrder(1, 2, 100, 64), Linear(50, 64, 128)],
    ids=lambda c: c.name,
)
def test_a_wrong_result_is_not_timed(bench, monkeypatch, case):
    def zeros(op):
        return lambda *a, **k: tuple(torch.zeros_like(x) for x in op(*a, **k))

    timed = []
    monkeypatch.setattr(bench.timings, "_speed", lambda *a: timed.append(a) or {})
    for name in ("attention_backward", "attention_jvp", "linear_relu_forward"):
        for module in ("fastattn.functional.attention", "fastattn.functional.relu_layers",
                       "fastattn.functional.attention_derivatives", "fastattn.ops"):  # fmt: skip
            if hasattr(__import__(module, fromlist=["x"]), name):
                monkeypatch.setattr(f"{module}.{name}", zeros(getattr(ops, name)))
    with pytest.raises(AssertionError, match="relative error"):
        bench.measure("cuda", case)
    assert not timed


PROFILED = {
    "attention_forward64": "attention_forward",
    "attention_forward128": "attention_forward",
    "attention_backward128": "attention_backward",
    "linear_forward256": "linear_relu_forward",
    "linear_grad_weight": "linear_relu_backward",
}


@pytest.mark.parametrize("kernel", PROFILES)
def test_a_profile_runs_its_pass_four_times(bench, kernel):
    _, case, what = PROFILES[kernel]
    small = Linear(20, 30, 40)
    if isinstance(case, Attention):
        small = case._replace(batch=1, heads=1, seq=64)
    with torch.profiler.profile() as profile:
        bench.profile(small, what)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get(f"fastattn::{PROFILED[kernel]}", 0) >= 4


def test_facts_of_the_machine(bench):
    facts = bench.environment()
    assert facts["versions"].startswith("torch 2.")
    assert all(value > 0 for value in facts["ceilings"].values())
    assert facts["cuda"] == (_extension.cuda_load_failure() or "")
    json.dumps(facts)


def test_sets_outgrow_the_cache_on_a_gpu():
    clock = Clock(CPU)
    assert clock.sets(1) == 1
    clock.on_gpu = True
    assert clock.sets(1 << 30) == 1
    assert clock.sets(1 << 25) * (1 << 25) > 64 << 20


def test_a_worker_tells_its_rows(capsys, monkeypatch, bench):
    monkeypatch.setattr(worker, "cases_of", lambda name: cases_of(name)[:2])
    assert worker.smoke(bench, "linear_forward128", only="") == 0
    told = [json.loads(line[1:]) for line in capsys.readouterr().out.splitlines()]
    assert [fact["kind"] for fact in told] == ["begin", "row", "begin", "row"]
    assert {fact["result"] for fact in told if fact["kind"] == "row"} == {"ok"}
