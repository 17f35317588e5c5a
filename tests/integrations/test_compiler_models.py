"""torch.compile(backend="fastattn") on Hugging Face models and under their Trainer."""

from __future__ import annotations

import copy
import os
from collections import Counter

import pytest
import torch
from torch import nn

import fastattn

pytest.importorskip("transformers")
pytestmark = pytest.mark.native

from tiny_models import TEXT, build  # noqa: E402


@pytest.fixture(autouse=True)
def _no_graph_of_another_test():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    ids = torch.randint(5, 99, (rows, length))
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}


def bert() -> nn.Module:
    return build("BertForSequenceClassification", {**TEXT, "intermediate_size": 48}).train()


def test_bert_in_training_has_two_graphs_for_all_lengths():
    model = bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout_prob = 0.0
    stock = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fastattn")
    for length in (12, 9, 15, 7):
        given = batch(4, length)
        losses = [m(**given).loss for m in (compiled, stock)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    report = fastattn.compile_report()
    assert report.graphs == 2
    assert Counter(entry.before for entry in report.swapped) == {
        "scaled_dot_product_attention": 2, "linear, gelu": 2,
    }  # fmt: skip
    assert {e.name for e in report.swapped if e.before != "linear, gelu"} == {
        f"bert.encoder.layer.{i}.attention.self" for i in (0, 1)
    }


def test_the_trainer_compiles_with_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    from fastattn.integrations.transformers import register

    register()
    register()  # twice is once
    rows = [{name: x[0] for name, x in batch(1, 12).items()} for _ in range(16)]
    model = bert()
    trainer = Trainer(
        model,
        TrainingArguments(
            tmp_path, max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            torch_compile=True, torch_compile_backend="fastattn", disable_tqdm=True,
            logging_steps=1, save_strategy="no",
        ),
        train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert torch.tensor(losses).isfinite().all()
    assert Counter(entry.before for entry in fastattn.compile_report().swapped) == {
        "scaled_dot_product_attention": 2, "linear, gelu": 2, "dropout, sum, layer_norm": 4,
        "dropout": 2,
    }  # fmt: skip
    trainer.save_model(str(tmp_path / "saved"))
    assert "model.safetensors" in os.listdir(tmp_path / "saved")
    assert type(model).from_pretrained(tmp_path / "saved").num_labels == 2
