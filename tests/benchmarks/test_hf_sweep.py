"""The sweep over Hugging Face's classes: its verdicts, on classes whose verdict is known."""

from __future__ import annotations

import pytest

import fastattn

pytest.importorskip("transformers")

import hf_eager
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


@pytest.mark.parametrize(
    "name, where, reason",
    [
        ("PaliGemmaModel", [0], hf_eager.LATER),
        ("UMT5ForConditionalGeneration", [0, 1, 2], hf_eager.LATER),
        ("MetaClip2Model", [1], hf_eager.EMPTY),
    ],
)
def test_eager_attention_that_differs_from_sdpa(name, where, reason):
    """In transformers itself, for a reason that the sweep finds by experiment."""
    row = hf_sweep.try_class(name)
    assert [i for i, x in enumerate(row["eager"]) if x > 0.01] == where
    assert row["eager why"] == [reason]
    assert row["verdict"] == "served"
    assert f"- {name}: {reason}." in hf_sweep.table([row])


def test_eager_attention_that_agrees():
    row = hf_sweep.try_class("DeepseekV3ForCausalLM")  # whose first sizes eager cannot run
    assert 0 < max(row["eager"]) < 1e-5
    assert "eager why" not in row
    assert "eager attention" not in hf_sweep.table([row]).partition("| class")[2]
