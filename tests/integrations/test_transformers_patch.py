"""register, patch and unpatch of Hugging Face models, whole and in parts."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import fastattn
from fastattn.integrations.transformers import attention_forward, attention_mask, register

transformers = pytest.importorskip("transformers")

from tiny_models import close_where, pair, tiny, tokens  # noqa: E402

register()
pytestmark = pytest.mark.native


def test_register_is_idempotent():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for _ in range(2):
        register()
    assert ALL_ATTENTION_FUNCTIONS["fastattn"] is attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["fastattn"] is attention_mask
    assert fastattn.integrations.transformers.register is register


def test_missing_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install 'transformers>=5'"):
        register()
    assert fastattn.patch(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).swapped


@pytest.mark.parametrize("wrapped", [False, True])
def test_patch_and_unpatch(wrapped):
    torch.manual_seed(0)
    config = tiny("bert", num_labels=3)
    config._attn_implementation = "sdpa"
    bert = transformers.BertForSequenceClassification(config).eval()
    model = nn.ModuleDict({"inner": bert}) if wrapped else bert
    inputs = tokens(3, 9, "right")
    expected = bert(**inputs).logits
    keys, parameters = list(model.state_dict()), list(model.parameters())
    report = fastattn.patch(model)
    blocks = {(name, f"fastattn {name}"): 2
              for name in ("BertSelfOutput", "BertIntermediate", "BertOutput")}  # fmt: skip
    others = {("sdpa attention", "fastattn attention"): 1, ("Dropout", "fastattn Dropout"): 8}
    assert report.counts == others | blocks
    assert not report.skipped
    assert bert.config._attn_implementation == "fastattn"
    torch.testing.assert_close(bert(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert "already patched" in str(fastattn.patch(model))
    twin = copy.deepcopy(model)
    assert fastattn.unpatch(model).swapped
    assert bert.config._attn_implementation == "sdpa"
    assert torch.equal(bert(**inputs).logits, expected)
    assert (twin["inner"] if wrapped else twin).config._attn_implementation == "fastattn"


def test_patch_keeps_eager_where_the_weights_are_wanted():
    config = tiny("bert", attn_implementation="eager", output_attentions=True)
    model = transformers.BertModel(config)
    report = fastattn.patch(model)
    assert {e.before for e in report.swapped} == {
        "BertSelfOutput",
        "BertIntermediate",
        "BertOutput",
        "Dropout",
    }
    assert "output_attentions" in report.skipped[0].reason
    assert model.config._attn_implementation == "eager"


def test_patch_of_a_model_without_sdpa():
    sizes = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GptOssConfig(
        **sizes, intermediate_size=16, num_key_value_heads=2, head_dim=8, num_local_experts=2
    )
    model = transformers.GptOssForCausalLM(config)
    before = model.config._attn_implementation
    report = fastattn.patch(model)
    assert "does not support sdpa" in str(report)
    assert model.config._attn_implementation == before


def test_patch_of_a_composite_model():
    encoder, decoder = tiny("bert"), tiny("bert", is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    torch.manual_seed(0)
    model = transformers.EncoderDecoderModel(config=config).eval()
    model.set_attn_implementation({"": "sdpa", "encoder": "sdpa", "decoder": "eager"})
    inputs = tokens(2, 9, "right") | {"decoder_input_ids": tokens(2, 5, None)["input_ids"]}
    expected = model(**inputs).logits
    parts = (model, model.encoder, model.decoder)
    before = [m.config._attn_implementation for m in parts]
    report = fastattn.patch(model)
    assert [m.config._attn_implementation for m in parts] == ["sdpa", "fastattn", "eager"]
    assert [e.name for e in report.swapped if e.before == "sdpa attention"] == ["encoder"]
    assert [e.name for e in report.skipped if "output_attentions" in e.reason] == ["decoder.bert"]
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    fastattn.unpatch(model)
    assert [m.config._attn_implementation for m in parts] == before


def test_patch_of_a_relu_model():
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(tiny("opt")).eval()
    inputs = tokens(2, 9, "right")
    expected = model(**inputs).logits
    report = fastattn.patch(model)
    close_where(inputs["attention_mask"], model(**inputs).logits, expected)
    assert ("sdpa attention", "fastattn attention") in report.counts
    assert all(e.reason for e in report.skipped)


def test_save_and_load(tmp_path):
    stock, ours = pair("BertModel", tiny("bert"))
    ours.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation != "fastattn"
    loaded = transformers.BertModel.from_pretrained(tmp_path, attn_implementation="fastattn")
    ids = tokens(2, 8, None)["input_ids"]
    torch.testing.assert_close(
        loaded.eval()(ids).last_hidden_state, stock(ids).last_hidden_state, rtol=1e-5, atol=1e-5
    )
