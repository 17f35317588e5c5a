"""The sweep over Hugging Face's classes: its verdicts, on classes whose verdict is known."""

from __future__ import annotations

import pytest

import fastattn

pytest.importorskip("transformers")

import hf_sweep

from fastattn.integrations.transformers import register

pytestmark = pytest.mark.native
register()


def test_served():
    row = hf_sweep.try_class("LlamaForCausalLM")
    assert (row["verdict"], row["patch"], row["generate"]) == ("served", "swapped", True)
    assert 0 < row["worst"] < 1e-5


def test_refused():
    row = hf_sweep.try_class("BloomForCausalLM")
    assert row["verdict"] == "refused"
    assert "scaled_dot_product_attention" in row["why"]
    text = hf_sweep.table([row, {"name": "Odd", "verdict": "not built", "why": "too large"}])
    assert "0 served, 1 refused, 0 wrong" in text
    assert "| BloomForCausalLM | refused |" in text
    assert "Not built or not run: Odd." in text


def test_wrong(monkeypatch):
    function = fastattn.functional.scaled_dot_product_attention

    def without_mask(query, key, value, mask, **options):
        return function(query, key, value, None, **options)

    monkeypatch.setattr(fastattn.functional, "scaled_dot_product_attention", without_mask)
    assert hf_sweep.try_class("BertLMHeadModel")["verdict"] == "wrong"
