"""doctor, the demo's data, and the demo end to end."""

from __future__ import annotations

import argparse
import gzip
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from fastattn import _extension, _support, backends
from fastattn.cli import check, doctor, main
from fastattn.cli.demo import corpus, digits
from fastattn.verification import families, first_use
from fastattn.verification.children import Result
from fastattn.verification.families import Outcome


@pytest.mark.native
def test_doctor_is_green(capsys):
    console = Console(width=200)
    assert doctor.doctor(console) == 0
    text = capsys.readouterr().out
    assert "native library" in text
    assert "attention, float32" in text
    assert "missing" not in text


def test_doctor_says_why_the_library_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(_extension, "_failure", "no C++ compiler was found; install g++")
    monkeypatch.setattr(_extension, "HAS_NATIVE", False)
    assert doctor.doctor(Console(width=200)) == 1
    assert "no C++ compiler was found; install g++" in capsys.readouterr().out


@pytest.mark.native
def test_the_check_prints_every_family(monkeypatch, capsys):
    monkeypatch.setattr(backends, "KERNELS", ("cpu", "cuda"))
    monkeypatch.setattr(backends, "unavailable", {"cpu": None, "cuda": "torch sees no GPU"}.get)
    assert doctor.doctor(Console(width=200), check=True) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "│ cpu " in line]
    rows = [row for row in rows if "inputs are on cpu" not in row]
    assert [row.split("│")[2].strip() for row in rows[-len(families.FAMILIES) :]] == list(
        families.FAMILIES
    )
    assert doctor.doctor(Console(width=200), check=True, backend="cuda") == 0
    assert "not available: torch sees no GPU" in capsys.readouterr().out


@pytest.mark.native
def test_the_check_is_red_where_a_kernel_is_wrong(monkeypatch, capsys):
    right = families.check

    def wrong(family, *args):
        return Outcome(1.0, 0.1, "dq") if family == "mlp" else right(family, *args)

    monkeypatch.setattr(families, "check", wrong)
    assert doctor.doctor(Console(width=200), check=True, backend="cpu") == 1
    text = capsys.readouterr().out
    assert "FAILED: dq: relative error 1.0e+00, at most 1.0e-01 is allowed" in text
    assert "1 failed. Please send this output to the project's issue tracker." in text


def test_the_check_forgets_what_first_uses_found_where_all_is_right(monkeypatch):
    forgotten = []
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(first_use, "forget", forgotten.append)
    for error in (0.0, 2.0):
        results = [Result("mlp", Outcome(error), 0.1)]
        monkeypatch.setattr(check, "_results", lambda name, results=results: results)
        check.check(Console(quiet=True), "triton")
    assert forgotten == ["triton"]


def test_a_backend_is_only_named_beside_check(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["doctor", "--backend", "cpu"])
    assert ended.value.code == 2
    assert "--backend: expected beside --check" in capsys.readouterr().err
    calls = []
    monkeypatch.setattr(doctor, "doctor", lambda **options: calls.append(options) or 0)
    assert main.main(["doctor", "--check", "--backend", "cpu"]) == 0
    assert calls == [{"check": True, "backend": "cpu"}]


def test_doctor_explains_the_calls_of_a_gpu(monkeypatch):
    monkeypatch.setattr(_extension, "HAS_CUDA", True)
    monkeypatch.setattr(_support, "capability_of", lambda gpu=None: 90)
    monkeypatch.setattr(backends.triton, "load_failure", lambda: None)
    with FakeTensorMode():
        calls = dict(doctor._calls("cuda"))
    assert {explanation.backend for explanation in calls.values()} == {"triton"}
    assert "not been verified" in str(calls["cuda: attention, bfloat16, gradients"])
    assert "one of bfloat16, float16" in str(calls["cuda: attention, float32"])


def test_doctor_tells_the_state_of_the_self_check(monkeypatch, capsys):
    good = first_use.kernel_of("triton", "linear_relu", torch.float16, 0)
    bad = first_use.kernel_of("triton", "attention_forward", torch.float16, 64)
    monkeypatch.setattr(backends, "self_check", True)
    monkeypatch.setattr(first_use, "known", lambda gpu: {good: "", bad: "out: off"})
    monkeypatch.setattr(backends, "unavailable", {"cuda": "none"}.get)
    Console(width=200).print(doctor._self_checks())
    text = capsys.readouterr().out
    assert "verified: float16" in text
    assert "failed: attention_forward (float16 head dim 64): out: off" in text
    assert text.count("not yet") == len(families.at_first_use("triton")) - 2
    assert "cuda" not in text
    monkeypatch.setattr(backends, "self_check", False)
    assert "FASTATTN_SELF_CHECK=0" in doctor._self_check("triton", "linear_relu")


def test_doctor_names_a_library_of_an_earlier_build(monkeypatch, capsys):
    facts = {**_extension.build_info, "reason": "the C++ build failed", "hint": "set CXX"}
    monkeypatch.setattr(_extension, "build_info", facts)
    doctor.doctor(Console(width=200))
    text = capsys.readouterr().out
    assert (
        "of an earlier build, as the last one failed: the C++ build failed; set CXX" in text
    ) == (_extension.HAS_NATIVE)


def test_no_sentence_and_no_module_is_on_both_sides():
    data = corpus.load_corpus(seed=0, packages=6, train_cap=100, test_cap=40)
    train, test = {s.text for s in data.train}, {s.text for s in data.test}
    assert len(train) > 400
    assert len(test) > 150
    assert not train & test
    assert not {s.module for s in data.train} & {s.module for s in data.test}
    assert data == corpus.load_corpus(seed=0, packages=6, train_cap=100, test_cap=40)


def idx(data: np.ndarray) -> bytes:
    return (
        b"\0\0\x08"
        + bytes([data.ndim])
        + struct.pack(f">{data.ndim}I", *data.shape)
        + data.tobytes()
    )


def test_idx_files(tmp_path):
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(images))
    (tmp_path / "b.gz").write_bytes(gzip.compress(idx(images)))
    assert (digits.read_idx(tmp_path / "a") == images).all()
    assert (digits.read_idx(tmp_path / "b.gz") == images).all()
    for broken in (idx(images)[:-1], idx(images)[:6], b"PNG"):
        (tmp_path / "c").write_bytes(broken)
        with pytest.raises(ValueError, match="expected"):
            digits.read_idx(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="--mnist"):
        digits.load_mnist(tmp_path)


@pytest.mark.native
def test_digits_agree():
    options = argparse.Namespace(mnist=None, seed=0, quick=True)
    for task in digits.run_digits(options, Console(quiet=True)):
        stock, *ours = task.runs
        assert stock.metrics["accuracy"] > 0.85
        for run in ours:
            assert abs(np.subtract(run.losses, stock.losses)[:20]).max() <= 1e-3, run
            assert abs(run.metrics["accuracy"] - stock.metrics["accuracy"]) < 0.03, run


@pytest.mark.slow
@pytest.mark.native
def test_the_quick_demo(tmp_path):
    command = [sys.executable, "-m", "fastattn", "demo", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "report.html").read_text()
    for word in ("BERT", "TrainingStep", "unpad=True", "sentence model", "peak MB"):
        assert word in page
    assert page.count("<img") == 3
    assert "http://" not in page
    assert "https://" not in page


def test_the_kind_of_an_operation():
    from fastattn.cli.demo.profile import OTHER, _kind

    kinds = {
        "fastattn::mlp_backward": "linear layers",
        "fastattn::attention_forward": "attention",
        "fastattn::dropout_add_norm_forward": "norms",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::addmm": "linear layers",
        "aten::bmm": "attention",
        "aten::_log_softmax": OTHER,
        "aten::bernoulli_": "dropout",
        "aten::gelu_backward": "activations",
        "aten::_fused_adamw_": "optimizer",
        "aten::embedding_dense_backward": "embeddings",
        "aten::copy_": OTHER,
    }
    assert {name: _kind(name) for name in kinds} == kinds
