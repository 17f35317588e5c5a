"""What a patched Hugging Face model writes is what the stock model writes, and what is pickled of
it runs in a process that only unpickles."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn

transformers = pytest.importorskip("transformers")

from tiny_models import BART, LLAMA, T5, TEXT, VISION, build, tokens  # noqa: E402

from fastattn.integrations.transformers import register  # noqa: E402

register()
pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("ignore::UserWarning")]

BERT = {**TEXT, "intermediate_size": 48}
KINDS = {
    "BertForSequenceClassification": BERT,
    "LlamaForCausalLM": LLAMA,
    "T5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": {"vocab_size": 99, **BART},
    "ViTModel": VISION,
}


def pair(name: str):
    stock = build(name, KINDS[name], "sdpa")
    ours = copy.deepcopy(stock)
    assert fastattn.patch(ours).swapped
    return stock, ours


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", KINDS)
def test_the_same_files(name, tmp_path):
    stock, ours = pair(name)
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    written, expected = files(tmp_path / "ours"), files(tmp_path / "stock")
    assert {"config.json", "model.safetensors"} <= written.keys()
    assert written == expected
    assert not any(b"fastattn" in content for content in written.values())


@pytest.mark.parametrize("name", KINDS)
def test_the_config(name):
    stock, ours = pair(name)
    copied = copy.deepcopy(ours.config)
    for config in (ours.config, copied):
        assert config._attn_implementation == "fastattn"
        assert config.to_dict() == stock.config.to_dict()
        assert config.to_diff_dict() == stock.config.to_diff_dict()
        assert config.to_json_string() == stock.config.to_json_string()
        assert json.loads(json.dumps(config._attn_implementation)) == "fastattn"
    fastattn.unpatch(ours)
    assert ours.config._attn_implementation == "sdpa"
    assert vars(ours.config) == vars(stock.config)
    assert copied._attn_implementation == "fastattn"  # a copy is its owner's


def test_a_process_without_fastattn_loads_the_folder(tmp_path):
    _, ours = pair("BertForSequenceClassification")
    ids = tokens(2, 9, None)["input_ids"]
    ours.save_pretrained(tmp_path)
    torch.save((ids, ours(ids).logits.detach()), tmp_path / "expected")
    code = """
import sys, torch
sys.modules["fastattn"] = None  # an import of it fails
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
assert model.config._attn_implementation == "sdpa"
ids, expected = torch.load(sys.argv[1] + "/expected")
torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    subprocess.run(command, check=True)


PARTS = {
    "whole": lambda m: m,
    "bert": lambda m: m.bert,
    "encoder": lambda m: m.bert.encoder,
    "layer": lambda m: m.bert.encoder.layer[0],
    "attention": lambda m: m.bert.encoder.layer[0].attention.self,
    "config": lambda m: m.config,
}


def test_each_part_runs_in_a_process_that_only_unpickles_it(tmp_path):
    """One process imports transformers, and runs each part in a child of its own."""
    _, patched = pair("BertForSequenceClassification")
    named = build("BertForSequenceClassification", BERT, "fastattn")
    ids, hidden = tokens(2, 9, None)["input_ids"], torch.randn(2, 9, 32)
    paths = []
    for how, model in (("patched", patched), ("named", named)):
        for name, part in PARTS.items():
            kept = part(model)
            args = (ids if name in ("whole", "bert") else hidden,)
            expected = None if name == "config" else kept(*args)[0].detach()
            paths.append(tmp_path / f"{how} {name}")
            paths[-1].write_bytes(pickle.dumps((kept, args, expected)))
    code = """
import os, pickle, sys, torch, transformers
from transformers import BertModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
for path in sys.argv[1:]:
    if os.fork() == 0:
        assert "fastattn" not in ALL_ATTENTION_FUNCTIONS.valid_keys()
        with open(path, "rb") as file:
            kept, args, expected = pickle.load(file)
        if expected is None:
            kept = BertModel(kept)
            assert kept.config._attn_implementation == "fastattn"
            kept(torch.ones(1, 4, dtype=torch.int64))
        else:
            torch.testing.assert_close(kept(*args)[0], expected, rtol=1e-4, atol=1e-5)
        os._exit(0)
    assert os.wait()[1] == 0, path
"""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, paths)]
    subprocess.run(command, check=True)


# --- the Trainer ----------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(5, 99, (9,), generator=generator)
        mask = torch.ones(9, dtype=torch.int64)
        mask[9 - i % 4 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids[0] % 2}


def trainer(model, folder: Path, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=4,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=Rows())


def assert_same_weights(ours, stock) -> None:
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if not name.endswith("key.bias"):  # its gradient is 0, and AdamW follows the rounding
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


def test_the_trainer_saves_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    stock = build("BertForSequenceClassification", {**BERT, **without}, "sdpa")
    ours, resumed = copy.deepcopy(stock), copy.deepcopy(stock)
    fastattn.patch(ours)
    trainer(stock, tmp_path / "stock").train()
    whole = trainer(ours, tmp_path / "ours")
    whole.train()
    whole.save_model(tmp_path / "saved")
    assert_same_weights(ours, stock)
    saved = files(tmp_path / "saved")
    assert not any(b"fastattn" in saved[name] for name in ("config.json", "model.safetensors"))
    one, other = (files(tmp_path / name / "checkpoint-4") for name in ("ours", "stock"))
    assert one.keys() == other.keys()
    assert one["config.json"] == other["config.json"] == saved["config.json"]
    # The middle of the stock run is a beginning for a patched model, and of the patched run too.
    for folder in ("ours", "stock"):
        twin = copy.deepcopy(resumed)
        assert fastattn.patch(twin).swapped
        checkpoint = tmp_path / folder / "checkpoint-2"
        trainer(twin, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
        assert_same_weights(twin, ours)
