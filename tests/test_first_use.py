"""A kernel's check before its first use: it sees wrong ones, disturbs nobody and remembers. The
CPU's kernels stand in for a GPU's."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from spoiled import spoil
from torch._subclasses.fake_tensor import FakeTensorMode

from fastattn import _extension, _support, backends
from fastattn.verification import first_use, record
from fastattn.verification.problems import Device

pytestmark = pytest.mark.native

CPU = Device("cpu", torch.device("cpu"))
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
    monkeypatch.setattr(_support, "capability_of", lambda index=None: 90)
    monkeypatch.setattr(backends.triton, "load_failure", lambda: None)
    monkeypatch.setattr(_extension, "HAS_CUDA", True)
    new_process(monkeypatch)
    return checks


def new_process(monkeypatch):
    """Forgets what this process knows."""
    monkeypatch.setattr(first_use, "_known", {})
    monkeypatch.setattr(backends, "_verdicts", {})
    monkeypatch.setattr(backends, "_warned", set())


def test_the_first_use_is_checked_once_and_remembered(gpu, monkeypatch):
    training = PROBLEM._replace(gradient=True)
    assert [backends.select(PROBLEM) for _ in range(3)] == ["triton"] * 3
    assert len(gpu) == 1
    assert backends.select(training) == "triton"
    assert len(gpu) == 2  # the backward
    monkeypatch.setattr(first_use, "check", None)  # the same calls need nothing any more
    assert backends.select(training) == "triton"


@pytest.mark.parametrize("op", backends.OPS)
def test_the_kernels_of_every_op_are_checked(gpu, op):
    problem = PROBLEM._replace(op=op, gradient=True)
    assert backends.select(problem) == "triton"
    checked = {kernel.family for kernel in first_use.known(0)}
    assert checked == set(backends.families(problem, "triton"))


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
