"""doctor, the demo's data, and the demo end to end."""

from __future__ import annotations

import argparse
import gzip
import struct
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from fastattn import _extension
from fastattn.cli import doctor
from fastattn.cli.demo import corpus, digits


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
    for result in digits.run_digits(options, Console(quiet=True)):
        assert result.loss_difference <= 1e-3
        assert result.metrics[0]["accuracy"] > 0.85


@pytest.mark.slow
@pytest.mark.native
def test_the_quick_demo(tmp_path):
    command = [sys.executable, "-m", "fastattn", "demo", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "BERT" in page
    assert "http://" not in page
    assert "https://" not in page
