"""The self-check of the kernels sees wrong ones, and what happens to processes that it starts."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from spoiled import spoil

from fastattn import backends, ops
from fastattn.verification import children, families, problems
from fastattn.verification.families import FAMILIES, check, families_of
from fastattn.verification.problems import Case, Device, NotFinished

pytestmark = pytest.mark.native

CPU = Device("cpu", torch.device("cpu"))
SMALL = Case(torch.float32, 24, is_causal=True, rows=20)
HALF = Case(torch.bfloat16, 64, is_causal=False, rows=33)
PROBLEM = backends.Problem("attention", "cuda", torch.float32, 64, gpu=0)


# --- the problems ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_right_kernels_pass(family):
    for case in (SMALL, HALF):
        outcome = check(family, CPU, [case])
        assert outcome.good, outcome
        assert 0 < outcome.error <= outcome.limit / 2
    assert check(family, CPU, [SMALL], first_use=True).good


# The ops of a family, with the number of results that are checked.
OPS_OF = {
    "attention_forward": {"attention_forward": 2},
    "attention_backward": {"attention_backward": 3},
    "attention_options": {"attention_forward": 1},
    "mask_gradient": {"attention_backward": 4},
    "varlen_attn": {"attention_backward": 3},
    "attention_jvp": {"attention_jvp": 2},
    "attention_double_backward": {"attention_double_backward": 6},
    "linear_relu": {"linear_relu_backward": 3},
    "linear_relu_jvp": {"linear_relu_jvp": 1},
    "mlp": {"mlp_backward": 7},
    "linear_layers": {"linear_forward": 2, "gated_linear_forward": 3, "linear_backward": 5},
    "activation_dropout": {"activation_forward": 1, "activation_backward": 1},
    "dropout_add_norm": {"dropout_add_norm_backward": 4},
    "training_step": {"training_step": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_wrong_result_is_seen(family, monkeypatch):
    for op, results in OPS_OF[family].items():
        for result in range(results):
            with monkeypatch.context() as patch:
                spoil(patch, op, result)
                outcome = check(family, CPU, [SMALL])
            assert not outcome.good, (op, result)
            assert "relative error 2.0e-04" in str(outcome)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_each_wrong_activation_is_seen(activation, monkeypatch):
    right = ops.activation_backward

    def wrong(grad, x, name, *options):
        found = right(grad, x, name, *options)
        return found * 1.001 if name == activation else found

    monkeypatch.setattr(ops, "activation_backward", wrong)
    outcome = check("activation_dropout", CPU, [SMALL])
    assert f"dx ({activation}, dropout" in str(outcome)
    assert not outcome.good
    assert check("activation_dropout", CPU, [SMALL], first_use=True).good == (activation != "gelu")


def test_a_key_that_is_lost_at_the_edge_is_seen_in_bfloat16(monkeypatch):
    right = ops.attention_forward

    def without_last_key(inputs, *args):
        key, value = (x[..., :-1, :] for x in (inputs.key, inputs.value))
        return right(inputs._replace(key=key, value=value), *args)

    monkeypatch.setattr(ops, "attention_forward", without_last_key)
    assert not check("attention_forward", CPU, [HALF], first_use=True).good


def test_nan_shape_and_bits(monkeypatch):
    for by in (lambda x: x * torch.nan, lambda x: x[..., :-1], lambda x: x[:1]):
        with monkeypatch.context() as patch:
            spoil(patch, by=by)
            assert check("attention_forward", CPU, [SMALL]).error == torch.inf
    spoil(monkeypatch, "linear_relu_forward", 1, lambda bits: bits ^ 1)
    assert not check("linear_relu", CPU, [SMALL]).good


def test_results_that_differ_between_two_calls(monkeypatch):
    calls = iter(range(100))
    spoil(monkeypatch, by=lambda x: x * (1 + next(calls) * 1e-7))
    outcome = check("attention_forward", CPU, [SMALL])
    assert "out: two calls with the same inputs differ" in str(outcome)
    assert outcome.lasting


def test_exceptions_and_memory(monkeypatch):
    def raise_(error):
        def by(x):
            raise error

        return by

    messages = {
        "no C compiler\n..": False,
        "Deterministic behavior was enabled, and you have CUDA >= 10.2": False,
        "CUDA error: an illegal memory access was encountered": True,
        "Triton Error [CUDA]: an illegal memory access was encountered": True,
    }
    for message, lasting in messages.items():
        with monkeypatch.context() as patch:
            spoil(patch, by=raise_(RuntimeError(message)))
            outcome = check("attention_forward", CPU, [SMALL])
        assert str(outcome) == f"RuntimeError: {message.splitlines()[0]}"
        assert (outcome.good, outcome.lasting) == (False, lasting)
    spoil(monkeypatch, by=raise_(RuntimeError("Triton Error [CUDA]: out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        check("attention_forward", CPU, [SMALL])


def test_a_kernel_that_hangs_is_given_up(monkeypatch):
    event = SimpleNamespace(record=lambda: None, query=lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(problems, "GPU_SECONDS", 0.05)
    with pytest.raises(NotFinished, match="did not finish within 0.05 s"):
        problems._wait(torch.device("cuda", 0))


def test_families_mirror_the_backends():
    assert families_of("cpu") == tuple(FAMILIES)
    assert families_of("cuda") == ("attention_forward", "attention_backward", "linear_relu", "mlp")
    assert set(FAMILIES) - set(families_of("triton")) == {
        "mlp",
        "linear_layers",
        "training_step",
    }
    for backend, op in (
        ("cuda", "attention"),
        ("cuda", "mlp"),
        *(("triton", op) for op in backends.OPS),
    ):
        problem = PROBLEM._replace(op=op, gradient=True)
        assert set(backends.families(problem, backend)) <= set(families.at_first_use(backend))
    assert all(c.dtype.itemsize == 2 for c in families.cases("cuda", torch.device("cuda")))


# --- child processes ------------------------------------------------------------------------------


def test_children_report():
    results = list(children.check("cpu", "cpu", ["linear_relu", "mlp"]))
    assert [r.family for r in results] == ["linear_relu", "mlp"]
    assert all(r.outcome.good and r.outcome.error > 0 for r in results)


def test_a_crash_and_a_hang_cost_their_own_rows(monkeypatch):
    script = """
import json, os, sys, time
for name in sys.argv[1:]:
    if name == "crash":
        print("sticky", file=sys.stderr, flush=True)
        os.abort()
    if name == "hang":
        time.sleep(60)
    outcome = {"exception": "RuntimeError: CUDA error"} if name == "raise" else {"error": 0.5}
    print("noise", flush=True)
    print(%r + json.dumps({"outcome": outcome, "seconds": 1.0}), flush=True)
"""
    started = []

    def command(backend, device, names):
        started.append(list(names))
        return [sys.executable, "-c", script % children.MARK, *names]

    monkeypatch.setattr(children, "command", command)
    names = ["good", "crash", "raise", "hang", "good"]
    results = list(children.check("cuda", "cuda", names, seconds=2.0))
    assert [r.family for r in results] == names
    texts = [r.outcome.exception for r in results]
    assert texts[0] == texts[4] == ""
    assert texts[1].endswith("sticky")
    assert texts[2] == "RuntimeError: CUDA error"
    assert texts[3] == "did not finish within 2 s"
    assert [len(s) for s in started] == [5, 3, 2, 1]
