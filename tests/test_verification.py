"""The self-check of the kernels: it sees wrong ones, disturbs nobody and remembers. The CPU's
kernels stand in for a GPU's."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastattn import _extension, backends, ops
from fastattn.verification import children, families, first_use, problems, record
from fastattn.verification.families import FAMILIES, check, families_of
from fastattn.verification.problems import Case, Device, NotFinished

pytestmark = pytest.mark.native

CPU = Device("cpu", torch.device("cpu"))
SMALL = Case(torch.float32, 24, is_causal=True, rows=20)
HALF = Case(torch.bfloat16, 64, is_causal=False, rows=33)
PROBLEM = backends.Problem("attention", "cuda", torch.float32, 64, gpu=0)
KERNEL = first_use.kernel_of("triton", "attention_forward", torch.float32, 64)
IDENTITY = {"gpu": "stand-in"}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A Hopper GPU whose kernels are the CPU's; counts the checks."""
    checks = []

    @contextlib.contextmanager
    def at(backend, index):
        checks.append(backend)
        yield CPU

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "self_check", True)
    monkeypatch.setattr(first_use, "_index", lambda index: index or 0)
    monkeypatch.setattr(first_use, "_at", at)
    monkeypatch.setattr(record, "identity", lambda index: dict(IDENTITY))
    monkeypatch.setattr(backends, "_capability", lambda index=None: 90)
    monkeypatch.setattr(backends.triton, "why_not", lambda: None)
    monkeypatch.setattr(_extension, "HAS_CUDA", True)
    new_process(monkeypatch)
    return checks


def new_process(monkeypatch):
    """Forgets what this process knows."""
    monkeypatch.setattr(first_use, "_known", {})
    monkeypatch.setattr(backends, "_verdicts", {})
    monkeypatch.setattr(backends, "_warned", set())


def spoil(monkeypatch, op="attention_forward", result=0, by=lambda x: x * (1 + 2e-4)):
    """Makes one result of an op wrong."""
    right = getattr(ops, op)

    def wrong(*args):
        found = right(*args)
        if isinstance(found, torch.Tensor):
            return by(found)
        return tuple(by(x) if n == result else x for n, x in enumerate(found))

    monkeypatch.setattr(ops, op, wrong)


# --- the problems ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_right_kernels_pass(family):
    for case in (SMALL, HALF):
        outcome = check(family, CPU, [case])
        assert outcome.good, outcome
        assert 0 < outcome.error <= outcome.limit / 2
    assert check(family, CPU, [SMALL], first_use=True).good


OPS_OF = {
    "attention_forward": ("attention_forward", 2),
    "attention_backward": ("attention_backward", 3),
    "attention_options": ("attention_forward", 1),
    "mask_gradient": ("attention_backward", 4),
    "varlen_attn": ("attention_backward", 3),
    "attention_jvp": ("attention_jvp", 2),
    "attention_double_backward": ("attention_double_backward", 6),
    "linear_relu": ("linear_relu_backward", 3),
    "linear_relu_jvp": ("linear_relu_jvp", 1),
    "mlp": ("mlp_backward", 7),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_wrong_result_is_seen(family, monkeypatch):
    op, results = OPS_OF[family]
    for result in range(results):
        with monkeypatch.context() as patch:
            spoil(patch, op, result)
            outcome = check(family, CPU, [SMALL])
        assert not outcome.good, result
        assert "relative error 2.0e-04" in str(outcome)


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
    assert set(FAMILIES) - set(families_of("triton")) == {"mlp"}
    for backend, op in (("cuda", "attention"), ("cuda", "mlp"), ("triton", "varlen_attn")):
        problem = PROBLEM._replace(op=op, gradient=True)
        assert set(backends.families(problem, backend)) <= set(families.at_first_use(backend))
    assert all(c.dtype.itemsize == 2 for c in families.cases("cuda", torch.device("cuda")))


# --- the first use --------------------------------------------------------------------------------


def test_the_first_use_is_checked_once_and_remembered(gpu, monkeypatch):
    training = PROBLEM._replace(gradient=True)
    assert [backends.select(PROBLEM) for _ in range(3)] == ["triton"] * 3
    assert len(gpu) == 1
    assert backends.select(training) == "triton"
    assert len(gpu) == 2  # the backward
    monkeypatch.setattr(first_use, "check", None)  # the same calls need nothing any more
    assert backends.select(training) == "triton"


def test_another_process_knows_and_another_driver_does_not(gpu, monkeypatch, tmp_path):
    assert first_use.check(KERNEL, 0) == ""
    new_process(monkeypatch)
    assert first_use.known(0) == {KERNEL: ""}
    assert first_use.check(KERNEL, 0) == ""
    assert len(gpu) == 1
    assert all(tmp_path in path.parents for path in record.folder(IDENTITY).iterdir())
    new_process(monkeypatch)
    monkeypatch.setattr(record, "identity", lambda index: {"gpu": "stand-in", "driver": "new"})
    assert first_use.check(KERNEL, 0) == ""
    assert len(gpu) == 2


def test_a_failure_is_left_out_of_the_default_alone(gpu, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch)
        with pytest.warns(backends.FastAttnWarning, match="doctor --check") as caught:
            assert backends.select(PROBLEM) == "reference"
    assert "triton: its kernel attention_forward (float32 head dim 64) failed" in str(
        caught[0].message
    )
    new_process(monkeypatch)  # which reads that it failed
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a question warns nobody
        chosen = backends.select(PROBLEM._replace(dtype=torch.float64), run_self_check=False)
        assert chosen == "triton"
        explained = backends._failures(PROBLEM, "triton", run=False)
    assert "failed the self-check on this GPU (out: relative error 2.0e-04" in explained[0].replace(
        ", float32, head dim 64, causal", ""
    )
    with pytest.warns(backends.FastAttnWarning, match="backend='triton'"):
        assert backends.select(PROBLEM, "triton") == "triton"
    assert len(gpu) == 1


def test_cuda_that_fails_leaves_the_call_to_triton(gpu, monkeypatch):
    problem = PROBLEM._replace(dtype=torch.bfloat16)
    monkeypatch.setattr(backends, "_cuda_first", True)
    with monkeypatch.context() as patch:
        spoil(patch, by=lambda x: x * 1.5)
        with pytest.warns(backends.FastAttnWarning, match="cuda: its kernel"):
            backends.select(problem, "cuda")
    assert backends.select(problem) == "triton"


def test_what_the_machine_lacks_is_forgotten_with_the_process(gpu, monkeypatch):
    def no_compiler(x):
        raise RuntimeError("Failed to find C compiler")

    with monkeypatch.context() as patch:
        spoil(patch, by=no_compiler)
        assert "C compiler" in first_use.check(KERNEL, 0)
    new_process(monkeypatch)
    assert first_use.check(KERNEL, 0) == ""


def test_no_memory_is_no_result(gpu, monkeypatch):
    def no_memory(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        spoil(patch, by=no_memory)
        assert backends.select(PROBLEM) == "triton"
    assert first_use.known(0) == {}
    assert first_use.check(KERNEL, 0) == ""


def test_the_switch(gpu, monkeypatch):
    monkeypatch.setattr(backends, "self_check", False)
    spoil(monkeypatch)
    assert backends.select(PROBLEM) == "triton"
    assert gpu == []
    monkeypatch.setenv("FASTATTN_SELF_CHECK", "off")
    with pytest.raises(ValueError, match="FASTATTN_SELF_CHECK: expected 0 or 1, got 'off'"):
        backends._switch("FASTATTN_SELF_CHECK", "1")


@pytest.mark.parametrize("broken", ["a file", "nowhere", "no home", "corrupt", "foreign"])
def test_a_cache_that_cannot_be_used(gpu, monkeypatch, tmp_path, broken):
    monkeypatch.chdir(tmp_path)
    if broken == "a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif broken == "nowhere":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    elif broken == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setattr(record.os.path, "expanduser", lambda path: path)
    else:
        record.write(IDENTITY, KERNEL, "")
        (path,) = record.folder(IDENTITY).iterdir()
        text = path.read_text()
        path.write_text(text[:30] if broken == "corrupt" else text.replace("stand-in", "other"))
    assert first_use.check(KERNEL, 0) == ""
    assert first_use.check(KERNEL, 0) == ""
    assert len(gpu) == 1
    assert not (tmp_path / "~").exists()


def test_forgotten_results(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    other = KERNEL._replace(backend="cuda")
    for kernel in (KERNEL, other):
        first_use.check(kernel, 0)
    first_use.forget("triton")
    assert first_use.known(0) == {other: ""}
    new_process(monkeypatch)
    assert first_use.known(0) == {other: ""}


def test_two_threads_check_once(gpu, monkeypatch):
    spoil(monkeypatch, by=lambda x: (time.sleep(0.05), x)[1])
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(first_use.check(KERNEL, 0))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [""] * 4
    assert len(gpu) == 1


def test_a_check_does_not_start_another(gpu, monkeypatch):
    spoil(monkeypatch, by=lambda x: (backends.select(PROBLEM), x)[1])
    assert first_use.check(KERNEL, 0) == ""
    assert len(gpu) == 1


def test_nothing_of_the_callers_is_touched(gpu, monkeypatch):
    packed, modes = [], []

    def record_modes(x):
        modes.append(torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"))
        return x

    spoil(monkeypatch, by=record_modes)
    state = torch.get_rng_state()
    hooks = torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x)
    training = PROBLEM._replace(gradient=True)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), hooks, torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            assert backends.select(training) == "triton"
            assert torch.get_default_dtype() == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert list(first_use.known(0).values()) == ["", ""]  # right, too, in spite of all these
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert torch.are_deterministic_algorithms_enabled()
    assert packed == []
    assert modes
    assert not any(modes)


class _FunctionMode(torch.overrides.TorchFunctionMode):
    pass


@contextlib.contextmanager
def _patched(name):
    with pytest.MonkeyPatch.context() as patch:
        module, attribute = name
        patch.setattr(module, attribute, lambda *args: True)
        yield


@pytest.mark.parametrize(
    "context",
    [
        FakeTensorMode,
        _FunctionMode,
        torch.autograd.forward_ad.dual_level,
        lambda: _patched((first_use, "_capturing")),
        lambda: _patched((torch.utils.data, "get_worker_info")),
    ],
    ids=["dispatch mode", "function mode", "forward mode", "capture", "worker"],
)
def test_there_are_times_when_nothing_is_checked(gpu, monkeypatch, context):
    with monkeypatch.context() as patch, context():
        spoil(patch)
        assert backends.select(PROBLEM) == "triton"
    assert gpu == []
    assert backends.select(PROBLEM) == "triton"  # nor has it been remembered as done
    assert len(gpu) == 1


def test_torch_func_checks_nothing(gpu):
    def function(x):
        assert backends.select(PROBLEM) == "triton"
        return x

    torch.func.vmap(function)(torch.zeros(2))
    assert gpu == []


def test_the_compiler_checks_nothing_and_knows_failures(gpu, monkeypatch):
    def function(x, backend):
        return x + (backends.select(PROBLEM) == backend)

    def compiled(backend):
        torch.compiler.reset()
        graph = torch.compile(function, fullgraph=True, backend="eager")
        return bool(graph(torch.zeros(1), backend))

    assert compiled("triton")
    assert gpu == []
    with monkeypatch.context() as patch:
        spoil(patch)
        assert first_use.check(KERNEL, 0)
    assert compiled("reference")


def test_an_identity_names_what_a_kernel_depends_on(monkeypatch):
    properties = SimpleNamespace(name="H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = record.identity(0)
    assert found["gpu"] == "H100 (9.0)"
    assert found["torch"].startswith(torch.__version__)
    assert {"driver", "triton", "fastattn", "kernels"} < set(found)
    assert found == record.identity(0)
    with monkeypatch.context() as patch:
        patch.setattr(_extension, "cuda_library", lambda: record._TRITON)
        assert record.identity(0)["kernels"] != found["kernels"]


def test_no_gpu_is_no_error():
    """As where a fake tensor says it is on one."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert first_use.check(KERNEL, 0) is None
    assert first_use.known(None) == {}


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
