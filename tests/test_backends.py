"""Which backend is taken for tensors on a GPU, told without one: fake tensors, made-up
capabilities."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastattn import _extension, _support, backends


@pytest.fixture
def gpu(monkeypatch):
    """Sets the capability of the GPU there would be; tensors are fake."""

    def set_capability(capability: int) -> None:
        monkeypatch.setattr(_support, "capability_of", lambda gpu=None: capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(backends.triton, "capability", lambda device: capability)

    monkeypatch.setattr(_extension, "HAS_CUDA", True)
    monkeypatch.setattr(backends.triton, "load_failure", lambda: None)
    set_capability(90)
    with FakeTensorMode():
        yield set_capability


@pytest.fixture
def cuda_first(gpu, monkeypatch):
    """The same with FASTATTN_CUDA=1."""
    monkeypatch.setattr(backends, "_cuda_first", True)
    return gpu


def tensors(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, **options):
    return [torch.empty(2, 4, 100, head_dim, dtype=dtype, device="cuda", **options) for _ in "qkv"]


UNPROVEN = (
    "it has not been verified on hardware yet; name it (backend='cuda' or FASTATTN_CUDA=1) to use "
    "it"
)


def test_hopper_takes_triton_until_cuda_is_proven_or_named(gpu, monkeypatch):
    q, k, v = tensors()
    explanation = backends.explain("attention", q, k, v)
    assert explanation.backend == "triton"
    assert explanation.reasons["cuda"] == [UNPROVEN]
    assert f"not cuda: {UNPROVEN}" in str(explanation)
    limited = backends.explain("attention", q, k, v, dropout_p=0.5)
    assert limited.reasons["cuda"] == ["it has no dropout"]
    for name in ("cuda", "triton"):  # what is named is obeyed, and says nothing of proofs
        explanation = backends.explain("attention", q, k, v, backend=name)
        assert explanation.backend == name
        assert explanation.reasons["cuda"] == []
    monkeypatch.setattr(backends, "_default", "cuda")
    explanation = backends.explain("attention", q, k, v)
    assert (explanation.backend, explanation.reasons["cuda"]) == ("cuda", [])
    problem = backends.attention_problem("attention", q, k, v, dropout_p=0.1)
    with pytest.raises(RuntimeError, match="no dropout"):
        backends.select(problem)


def test_the_switch_puts_cuda_first(monkeypatch):
    assert not backends._cuda_first, "the tests' environment sets FASTATTN_CUDA"
    for value, on in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("FASTATTN_CUDA", value)
        assert backends._switch("FASTATTN_CUDA", "0") == on
    monkeypatch.setenv("FASTATTN_CUDA", "yes")
    with pytest.raises(ValueError, match="FASTATTN_CUDA: expected 0 or 1, got 'yes'"):
        backends._switch("FASTATTN_CUDA", "0")


def test_a_proven_family_is_taken_where_all_that_the_call_needs_are(gpu, monkeypatch):
    x, w = (torch.empty(n, 8, device="cuda", dtype=torch.bfloat16) for n in (4, 3))
    calls = {
        "forward": ("attention", *tensors()),
        "training": ("attention", *tensors(requires_grad=True)),
        "linear_relu": ("linear_relu", x, w),
        "mlp": ("mlp", x, [w]),
    }

    def taken(*families):
        monkeypatch.setattr(backends, "PROVEN_ON_HARDWARE", frozenset(families))
        found = {name: backends.explain(*call).backend for name, call in calls.items()}
        assert set(found.values()) <= {"cuda", "triton"}
        return {name for name, backend in found.items() if backend == "cuda"}

    assert taken() == set()
    assert taken("attention_forward") == {"forward"}
    assert taken("attention_backward") == set()
    assert taken("attention_forward", "attention_backward") == {"forward", "training"}
    assert taken("linear_relu") == {"linear_relu"}
    assert taken("mlp") == set()
    assert taken("linear_relu", "mlp") == {"linear_relu", "mlp"}


def test_without_triton_the_reference_says_that_cuda_could(gpu, monkeypatch):
    monkeypatch.setattr(backends.triton, "load_failure", lambda: "triton is not installed")
    monkeypatch.setattr(backends, "_warned", set())
    problem = backends.attention_problem("attention", *tensors())
    with pytest.warns(backends.FastAttnWarning, match="triton is not installed; cuda: it has not"):
        assert backends.select(problem) == "reference"


def test_hopper_takes_cuda(cuda_first):
    q, k, v = tensors()
    keys = torch.ones(2, 1, 1, 100, dtype=torch.bool, device="cuda")
    for call in ({}, {"attn_mask": keys}, {"is_causal": True, "window_size": (8, 0)}):
        assert backends.explain("attention", q, k, v, **call).backend == "cuda", call
    assert backends.explain("attention", q, k, v, keys).backend == "cuda"
    assert backends.explain("attention", *tensors(256)).backend == "cuda"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"dropout_p": 0.1}, "no dropout"),
        ({"softcap": 20.0}, "no softcap"),
        ({"alibi_slopes": (4,)}, "no ALiBi slopes"),
        ({"attn_mask": (2, 1, 1, 100)}, "no float mask"),
        ({"attn_mask": (100, 100)}, "no mask that differs between heads or queries"),
        ({"scale": 0.0}, "no scale of 0 or less"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cuda_leaves_to_triton(cuda_first, call, reason):
    call = {
        name: torch.empty(value, device="cuda") if isinstance(value, tuple) else value
        for name, value in call.items()
    }
    explanation = backends.explain("attention", *tensors(), **call)
    assert explanation.backend == "triton"
    assert reason in str(explanation)


def test_dtype_head_dim_gradients_and_capability(cuda_first):
    def chosen(*args, **options):
        return backends.explain("attention", *tensors(*args, **options))

    assert "torch.float32 is not one of" in chosen(dtype=torch.float32).reasons["cuda"][0]
    assert chosen(128, requires_grad=True).backend == "cuda"
    wide = chosen(256, requires_grad=True)
    assert wide.backend == "triton"
    assert wide.reasons["cuda"] == ["head dim 256 is above 128 with gradients"]
    with torch.no_grad():
        assert chosen(256, requires_grad=True).backend == "cuda"
    cuda_first(80)
    assert "compute capability 8.0 is not 9.0" in chosen().reasons["cuda"][0]
    assert chosen().backend == "triton"


def test_packed_sequences_are_tritons(cuda_first):
    q, k, v = (x.flatten(0, 1) for x in tensors())
    assert backends.explain("varlen_attn", q, k, v).backend == "triton"


def test_layers(cuda_first):
    x, w = (torch.empty(n, 8, device="cuda", dtype=torch.bfloat16) for n in (4, 3))
    assert backends.explain("linear_relu", x, w).backend == "cuda"
    assert "mlp: cuda (one kernel for all layers)" in str(backends.explain("mlp", x, [w]))
    wide = torch.empty(300, 8, device="cuda", dtype=x.dtype)
    assert "mlp: cuda (a layer at a time)" in str(backends.explain("mlp", x, [wide]))
    assert backends.explain("mlp", x.float(), [w.float()]).backend == "triton"
    explanation = backends.explain("linear_relu", x.new_empty(0, 8), w)
    assert explanation.reasons["cuda"] == ["it has no sizes of 0"]
    assert explanation.backend == "triton"
    tall = torch.empty(2**30, 8, device="cuda", dtype=x.dtype)
    explanation = backends.explain("linear_relu", tall, w)
    assert explanation.reasons["cuda"] == ["it has no extents of 2^30 and more"]
    assert explanation.backend == "triton"


def test_the_tensors_gpu_counts_and_not_the_current_one(cuda_first, monkeypatch):
    capabilities = [90, 80]
    monkeypatch.setattr(
        _support, "capability_of", lambda gpu=None: capabilities[0 if gpu is None else gpu]
    )
    for index, chosen in enumerate(("cuda", "triton")):
        device = f"cuda:{index}"
        qkv = [torch.empty(1, 1, 4, 64, dtype=torch.float16, device=device) for _ in "qkv"]
        assert backends.explain("attention", *qkv).backend == chosen
        layer = [torch.empty(4, 8, dtype=torch.float16, device=device) for _ in "xw"]
        assert backends.explain("linear_relu", *layer).backend == chosen


def test_an_explicit_backend_is_obeyed_or_raises(gpu):
    problem = backends.attention_problem("attention", *tensors(), dropout_p=0.1)
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot serve attention: .*no dropout"):
        backends.select(problem, "cuda")
    assert backends.select(problem, "triton") == "triton"


def test_a_capability_is_a_constant_to_the_compiler(monkeypatch):
    monkeypatch.setattr(backends.triton, "capability", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        return x + _support.capability_of()

    assert function(torch.zeros(1)).item() == 90


def test_integrations_ask_who_serves_by_default(monkeypatch):
    """On a Hopper GPU without Triton the CUDA kernels serve only calls that name them: a drop-in
    then leaves the call to torch."""
    problem = backends.Problem("attention", "cuda", torch.bfloat16, 64)
    monkeypatch.setattr(_extension, "HAS_CUDA", True)
    monkeypatch.setattr(_support, "capability_of", lambda gpu=None: 90)
    monkeypatch.setattr(backends.triton, "load_failure", lambda: "Triton is not installed")
    assert not backends.unsupported(problem, "cuda")
    assert "verified on hardware" in backends.unsupported_by_default(problem, "cuda")[0]
    assert backends.unsupported_by_default(problem, "triton")
    monkeypatch.setattr(backends, "_cuda_first", True)
    assert not backends.unsupported_by_default(problem, "cuda")
