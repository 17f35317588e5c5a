"""What travels to a GPU machine, and that it loads where no Python module of ours can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu_bundle
import pytest

from fastattn import _extension

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """if True:
    import sys
    sys.modules["fastattn._C"] = None  # built for another Python
    import torch, fastattn
    from fastattn import _extension
    assert _extension.HAS_NATIVE, _extension.load_failure()
    assert _extension.HAS_CUDA, _extension.cuda_load_failure()
    assert _extension.cpu_isa() is None and _extension.cpu_features() == []
    for op in ("attention_forward", "attention_backward", "linear_relu_backward", "mlp_forward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastattn::{op}", "CUDA"), op
    q = torch.randn(1, 2, 5, 8)
    fastattn.scaled_dot_product_attention(q, q, q, backend="cpu")
    print("loaded", _extension.cuda_library())
"""


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.native
@pytest.mark.skipif(not _extension.HAS_CUDA, reason="no CUDA library was built here")
def test_the_libraries_load_without_a_module_of_python(tmp_path):
    facts = gpu_bundle.collect(ROOT / "fastattn", tmp_path)
    (tmp_path / "_build_info.json").write_text(json.dumps(facts))
    done = python(PROGRAM, FASTATTN_LIBRARIES=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"loaded {tmp_path}/_cuda.so" in done.stdout
    # A variant is the file of its name.
    (tmp_path / "_cuda.so").rename(tmp_path / "_cuda_watchdog.so")
    done = python(PROGRAM, FASTATTN_LIBRARIES=str(tmp_path), FASTATTN_CUDA_VARIANT="watchdog")
    assert f"loaded {tmp_path}/_cuda_watchdog.so" in done.stdout, done.stderr


def test_an_empty_folder_of_libraries_is_named(tmp_path):
    done = python(
        "from fastattn import _extension as e; print(e.load_failure(), e.cuda_load_failure())",
        FASTATTN_LIBRARIES=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert f"no library was built in {tmp_path}" in done.stdout
    assert "correct FASTATTN_LIBRARIES" in done.stdout


def setup_that_builds(fail: str = "", size: int = 10) -> SimpleNamespace:
    class NativeBuildError(Exception):
        pass

    def build_cuda(folder: Path, variant: str = "") -> dict:
        if fail:
            raise NativeBuildError(fail, "do something")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_cuda.so").write_bytes(bytes(size))
        return {"archs": ["90a"], "ptxas": {}}

    def build_native(folder: Path, least: bool) -> list[str]:
        assert least
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_ops.so").write_bytes(b"ops")
        return ["generic"]

    return SimpleNamespace(
        build_cuda=build_cuda, build_native=build_native, NativeBuildError=NativeBuildError
    )


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A checkout where the libraries were built."""
    package = tmp_path / "checkout/fastattn"
    package.mkdir(parents=True)
    for name in ("_ops.so", "_cuda.so"):
        (package / name).write_bytes(b"library")
    facts = {"native": True, "isas": ["avx2"], "cuda": {"built": True, "archs": ["90a"]}}
    (package / "_build_info.json").write_text(json.dumps(facts))
    monkeypatch.setattr(gpu_bundle, "ROOT", package.parent)
    return package


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_in_a_bundle(package, tmp_path):
    folder = gpu_bundle.make(tmp_path / "bundle", setup_that_builds())
    assert names(folder) == {
        "_ops.so", "_cuda.so", "_cuda_watchdog.so", "_cuda_tune.so", "_build_info.json",
    }  # fmt: skip
    assert json.loads((folder / "_build_info.json").read_text())["cuda"]["built"]
    assert names(tmp_path) == {"bundle", "checkout"}


def test_a_restricted_build_needs_no_package(tmp_path):
    folder = gpu_bundle.make(tmp_path / "bundle", setup_that_builds(), least=True)
    assert names(folder) == {"_ops.so", "_cuda.so", "_build_info.json"}
    facts = json.loads((folder / "_build_info.json").read_text())
    assert facts["native"]
    assert facts["isas"] == ["generic"]


@pytest.mark.parametrize(
    ("setup", "reason"),
    [(setup_that_builds(fail="no nvcc was found"), "no nvcc was found"),
     (setup_that_builds(size=gpu_bundle.MOST_BYTES), "more than 40 can travel")],
    ids=["no nvcc", "too large"],
)  # fmt: skip
def test_a_failure_leaves_the_last_bundle(package, tmp_path, setup, reason):
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "_cuda.so").write_text("of the last one")
    with pytest.raises((gpu_bundle.BundleError, setup.NativeBuildError), match=reason):
        gpu_bundle.make(output, setup)
    assert (output / "_cuda.so").read_text() == "of the last one"
    assert names(tmp_path) == {"bundle", "checkout"}


def test_one_line_says_what_is_missing(package, monkeypatch, capsys):
    monkeypatch.setattr(gpu_bundle, "load_setup", lambda: setup_that_builds("no nvcc was found"))
    monkeypatch.setattr(sys, "argv", ["gpu_bundle.py", "--output", str(package.parent / "b")])
    assert gpu_bundle.main() == 1
    assert capsys.readouterr().err == "gpu-bundle: no nvcc was found; do something\n"
    monkeypatch.setattr(sys, "argv", ["gpu_bundle.py", "--output", "/dev/null/b"])
    assert gpu_bundle.main() == 1
    assert capsys.readouterr().err.startswith("gpu-bundle: --output: cannot write beside")
    (package / "_cuda.so").unlink()
    monkeypatch.setattr(sys, "argv", ["gpu_bundle.py", "--output", str(package.parent / "b")])
    assert gpu_bundle.main() == 1
    assert "_cuda.so was not built" in capsys.readouterr().err
