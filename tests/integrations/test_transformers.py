"""attn_implementation="fastattn" against "sdpa": BERT with padding, decoders with GQA and a KV
cache."""

from __future__ import annotations

import pytest
import torch

import fastattn

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _registered():
    from fastattn.integrations.transformers import register

    torch.use_deterministic_algorithms(False)  # transformers' own code
    register()


def bert_config(**options):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    return transformers.BertConfig(vocab_size=99, num_labels=3, **sizes, **options)


def pair(model_class, config):
    """The same weights under both implementations."""
    torch.manual_seed(0)
    stock = model_class._from_config(config, attn_implementation="sdpa")
    ours = model_class._from_config(config, attn_implementation="fastattn")
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def batch():
    ids = torch.randint(1, 99, (3, 17))
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, 9:] = 0
    mask[2, 3:] = 0
    return dict(input_ids=ids, attention_mask=mask)


def test_bert_with_padding():
    config = bert_config(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    stock, ours = pair(transformers.BertForSequenceClassification, config)
    inputs = batch() | dict(labels=torch.tensor([0, 1, 2]))
    for model in (stock, ours):
        model.train()
        model(**inputs).loss.backward()
    torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=1e-5)
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)
    # The mask matters: what stands in the padding does not.
    changed = dict(
        inputs, input_ids=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 5)
    )
    torch.testing.assert_close(ours(**changed).logits, ours(**inputs).logits)


def test_bert_trains_with_attention_dropout_in_the_kernel(monkeypatch):
    from fastattn import functional

    seen = []
    original = functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append(kwargs["dropout_p"])
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    _, ours = pair(transformers.BertForSequenceClassification, bert_config())
    ours.train()(**batch())
    assert seen == [0.1, 0.1]
    ours.eval()(**batch())
    assert seen[2:] == [0.0, 0.0]


def test_patch_and_unpatch_a_loaded_model():
    stock = transformers.BertModel._from_config(bert_config(), attn_implementation="sdpa").eval()
    expected = stock(**batch()).last_hidden_state
    torch.manual_seed(0)
    inputs = batch()
    expected = stock(**inputs).last_hidden_state
    report = fastattn.patch(stock)
    assert "sdpa attention -> fastattn" in str(report)
    assert stock.config._attn_implementation == "fastattn"
    torch.testing.assert_close(stock(**inputs).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    fastattn.unpatch(stock)
    assert stock.config._attn_implementation == "sdpa"


def decoders():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    llama = transformers.LlamaConfig(
        vocab_size=99, intermediate_size=64, num_key_value_heads=2, pad_token_id=0, **sizes
    )
    gpt2 = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, pad_token_id=0)
    return [(transformers.LlamaForCausalLM, llama), (transformers.GPT2LMHeadModel, gpt2)]


@pytest.mark.parametrize("which", [0, 1], ids=["llama with GQA", "gpt2"])
def test_decoders_with_left_padding_and_cache(which):
    stock, ours = (m.eval() for m in pair(*decoders()[which]))
    inputs = batch()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    torch.testing.assert_close(
        ours(input_ids=inputs["input_ids"]).logits,
        stock(input_ids=inputs["input_ids"]).logits,
        atol=1e-5,
        rtol=1e-4,
    )
    kept = inputs["attention_mask"].bool()
    logits = [m(**inputs).logits[kept] for m in (ours, stock)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)
    options = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.generate(**inputs, **options), stock.generate(**inputs, **options))


def test_a_mask_that_is_not_understood_raises():
    from fastattn.integrations.transformers import attention_forward

    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="attention_mask: expected a 4-D tensor"):
        attention_forward(torch.nn.Module(), q, q, q, torch.ones(1, 5))
    with pytest.raises(TypeError, match="attention_mask: expected bool or floating point"):
        attention_forward(torch.nn.Module(), q, q, q, torch.ones(1, 1, 1, 5, dtype=torch.long))
