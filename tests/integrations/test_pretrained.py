"""Hugging Face classes of many kinds: served as sdpa and eager serve them, or refused in words."""

from __future__ import annotations

import copy

import pytest
import torch

import fastattn

transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    BART,
    GEMMA,
    HEADS,
    IDS,
    LATENT,
    LLAMA,
    SPARSE,
    T5,
    TEXT,
    VISION,
    WAV,
    build,
    results,
    tokens,
)

from fastattn.integrations import pretrained  # noqa: E402
from fastattn.integrations.transformers import attention_forward, register  # noqa: E402

register()
pytestmark = pytest.mark.native

SERVED = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": {**LLAMA, "sliding_window": 4},
    "GPT2LMHeadModel": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "DeepseekV3ForCausalLM": LATENT,  # Dv differs from D
    "Gemma3ForCausalLM": GEMMA,  # layers with and without a window
    "BertModel": {**TEXT, "intermediate_size": 48},
    "ModernBertForMaskedLM": {**TEXT, "intermediate_size": 48, "local_attention": 6, **IDS},
    "BartForConditionalGeneration": {"vocab_size": 99, **BART},
    "T5ForConditionalGeneration": T5,
    "MT5ForConditionalGeneration": T5,
    "UMT5ForConditionalGeneration": T5,
    "ViTModel": VISION,
    "Wav2Vec2Model": WAV,
}
EAGER_DIFFERS = {"UMT5ForConditionalGeneration"}  # from sdpa, in transformers 5.17 itself
CONVERTING = {**TEXT, "intermediate_size": 48, "embedding_size": 32}
REFUSED = {  # the options, and the words beside transformers' own
    "BloomForCausalLM": ({"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}, None),
    "MptForCausalLM": ({"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4}, None),
    "ConvBertModel": (CONVERTING, None),
    "VisualBertModel": ({**TEXT, "intermediate_size": 48}, None),
    "CanineModel": ({**HEADS, "hidden_size": 32, "intermediate_size": 48}, None),
    "GPTNeoForCausalLM": (
        {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        None,
    ),
    "FalconForCausalLM": (TEXT, "asks whether"),
    "DeepseekV32ForCausalLM": ({**LATENT, **SPARSE}, "asks whether"),
}


@pytest.fixture
def calls(monkeypatch):
    """The options of every call of the function, with its tensors' dtypes."""
    seen = []
    function = fastattn.functional.scaled_dot_product_attention

    def spy(query, key, value, mask, **options):
        seen.append({"dtypes": (query.dtype, key.dtype, value.dtype), "mask": mask, **options})
        return function(query, key, value, mask, **options)

    monkeypatch.setattr(fastattn.functional, "scaled_dot_product_attention", spy)
    return seen


def assert_same(ours, stock, padded) -> None:
    for a, b in zip(results(ours, padded), results(stock, padded), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


def attention_of(model) -> set[str]:
    return {
        m.config._attn_implementation
        for m in model.modules()
        if isinstance(m, transformers.PreTrainedModel)
    }


@pytest.mark.parametrize("name", SERVED)
def test_served(name, calls):
    stock, eager, ours = (build(name, SERVED[name], a) for a in ("sdpa", "eager", "fastattn"))
    patched = copy.deepcopy(stock)
    report = fastattn.patch(patched)
    modules = sum("AttentionInterface" in e.reason and e.after is not None for e in report.entries)
    assert modules >= 1
    assert attention_of(ours) == attention_of(patched) == {"fastattn"}
    for padded in (None, "left", "right"):
        before = len(calls)
        assert_same(ours, stock, padded)
        each = len(calls) - before
        assert each >= 2
        assert_same(patched, stock if name in EAGER_DIFFERS else eager, padded)
        assert len(calls) - before == 2 * each  # patch reaches every stack that the name reaches
    fastattn.unpatch(patched)
    assert attention_of(patched) == {"sdpa"}
    before = len(calls)
    for a, b in zip(results(patched, "left"), results(stock, "left"), strict=True):
        assert torch.equal(a, b)
    assert len(calls) == before


def test_the_comparison_sees_a_lost_mask(monkeypatch):
    stock, ours = (build("LlamaForCausalLM", LLAMA, a) for a in ("sdpa", "fastattn"))
    function = fastattn.functional.scaled_dot_product_attention

    def without_mask(query, key, value, mask, **options):
        return function(query, key, value, None, **options)

    monkeypatch.setattr(fastattn.functional, "scaled_dot_product_attention", without_mask)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(ours, stock, "left")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, calls):
    options, words = REFUSED[name]
    words = words or "does not support an attention implementation through torch.nn.functional"
    with pytest.raises(ValueError, match='attn_implementation="fastattn"') as error:
        build(name, options, "fastattn")
    assert words in str(error.value)
    stock = build(name, options, "eager")
    patched = copy.deepcopy(stock)
    report = fastattn.patch(patched)
    words = REFUSED[name][1] or "does not support sdpa"
    assert any(words in e.reason for e in report.skipped if "attention" in e.before)
    assert "fastattn" not in attention_of(patched)
    # Other blocks than attention may be the kernels', whose sums are rounded elsewhere.
    for a, b in zip(results(patched, "left"), results(stock, "left"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not calls


def test_refused_with_sdpa_set():
    """These two do support sdpa, by its name."""
    for name in ("FalconForCausalLM", "DeepseekV32ForCausalLM"):
        model = build(name, REFUSED[name][0])
        assert "asks whether the implementation's name is sdpa" in str(fastattn.patch(model))
        assert attention_of(model) == {"sdpa"}


# --- the attention function -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["indices", "block_indices", "head_mask", "a_new_one"])
def test_unknown_keywords_are_refused(name):
    q = torch.randn(2, 4, 8, 16)
    for given in (torch.zeros(2, 8, 3, dtype=torch.int64), False):
        with pytest.raises(ValueError, match=f"{name}: fastattn attention does not know"):
            attention_forward(torch.nn.Module(), q, q, q, None, **{name: given})
    attention_forward(torch.nn.Module(), q, q, q, None, **{name: None})


def test_keywords_without_effect():
    q = torch.randn(1, 4, 8, 16)
    one, two = torch.tensor([0, 8]), torch.tensor([0, 3, 8])
    expected = attention_forward(torch.nn.Module(), q, q, q, None)[0]
    harmless = {"position_ids": torch.arange(8)[None], "sliding_window": 4, "use_cache": True}
    out = attention_forward(torch.nn.Module(), q, q, q, None, cu_seq_lens_q=one, **harmless)[0]
    assert torch.equal(out, expected)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    out = attention_forward(torch.nn.Module(), q, q, q, mask, cu_seq_lens_q=two)[0]
    assert torch.equal(out, attention_forward(torch.nn.Module(), q, q, q, mask)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_empty_row_beside_a_position_bias(dtype, autocast):
    """sdpa and eager attention mask with the least finite number: the mean of all values."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v = torch.randn(3, 2, 4, 5, 8)
    bias = torch.randn(1, 4, 5, 5)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, 0, 2] = False
    mask[0, 0, :, 3:] = False
    tensors = (q, k, v) if autocast else tuple(x.to(dtype) for x in (q, k, v))
    bias = bias if autocast else bias.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast and dtype != torch.float32):
        out, expected = (
            f(torch.nn.Module(), *tensors, mask, position_bias=bias, is_causal=False)[0]
            for f in (attention_forward, sdpa_attention_forward)
        )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(out[0], expected[0], rtol=0, atol=tolerance)
    if not autocast:
        torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    if dtype != torch.float16:  # whose least number is not far below all scores
        torch.testing.assert_close(out[1, 2], v[1].mean(1).to(out.dtype), rtol=0, atol=tolerance)


# --- whole models ---------------------------------------------------------------------------------


def test_autocast_training_with_rotary_embeddings(calls):
    losses, gradients = [], []
    ids = tokens(2, 12, None)["input_ids"]
    for implementation in ("sdpa", "fastattn"):
        model = build("LlamaForCausalLM", {**LLAMA, "use_cache": False}, implementation).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert calls[0]["dtypes"] == (torch.float32, torch.float32, torch.bfloat16)
    assert abs(losses[0] - losses[1]) < 0.02 * losses[0]
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


@pytest.mark.parametrize("cache", [None, "static"])
def test_beams(cache):
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": cache, "disable_compile": True}
    stock = build("LlamaForCausalLM", LLAMA)
    patched = copy.deepcopy(stock)
    fastattn.patch(patched)
    a, b = (m.generate(**tokens(3, 7, "left"), **options) for m in (patched, stock))
    assert torch.equal(a, b)


def test_patch_on_the_meta_device():
    stock = build("BertModel", SERVED["BertModel"])
    config = copy.deepcopy(stock.config)
    with torch.device("meta"):
        model = transformers.BertModel(config).eval()
    assert fastattn.patch(model).swapped
    model.load_state_dict(stock.state_dict(), assign=True)
    model.embeddings.position_ids = torch.arange(512)[None]
    model.embeddings.token_type_ids = torch.zeros(1, 512, dtype=torch.int64)
    assert_same(model, stock, "right")


def test_two_models_of_one_config():
    """transformers keeps the name in the config, which models may share."""
    config = build("BertModel", SERVED["BertModel"]).config
    one, two = (transformers.BertModel(config).eval() for _ in range(2))
    before = list(results(two, "left"))
    fastattn.patch(one)
    for a, b in zip(results(two, "left"), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)
    fastattn.patch(two)
    fastattn.unpatch(one)
    assert attention_of(two) == {"sdpa"}
    fastattn.unpatch(two)
    assert all(torch.equal(a, b) for a, b in zip(results(two, "left"), before, strict=True))


def test_softcap_that_sdpa_leaves_out():
    model = build("Gemma2ForCausalLM", {**GEMMA, "attn_logit_softcapping": 2.0})
    before = list(results(model, "left"))
    report = fastattn.patch(model)
    assert "softcap" in report.skipped[0].reason
    assert attention_of(model) == {"sdpa"}
    for a, b in zip(results(model, "left"), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_unpatch_keeps_what_was_set_after_patch():
    model = build("T5ForConditionalGeneration", T5)
    fastattn.patch(model)
    for part in (model, model.encoder, model.decoder):
        part.set_attn_implementation("eager")
    report = fastattn.unpatch(model)
    assert attention_of(model) == {"eager"}
    assert all("set to another one" in e.reason for e in report.skipped)
    assert not pretrained.undo(model)


def test_a_part_that_the_user_had_set_stays_set():
    model = build("T5ForConditionalGeneration", T5)
    model.encoder.set_attn_implementation("fastattn")
    fastattn.patch(model)
    fastattn.unpatch(model)
    assert model.encoder.config._attn_implementation == "fastattn"
    assert model.decoder.config._attn_implementation == "sdpa"


def test_register_guards_the_name_once():
    method = transformers.PreTrainedModel.get_correct_attn_implementation
    register()
    assert transformers.PreTrainedModel.get_correct_attn_implementation is method
    model = build("BloomForCausalLM", REFUSED["BloomForCausalLM"][0], "eager")
    with pytest.raises(ValueError, match="fastattn"):
        model.get_correct_attn_implementation("fastattn")
    assert model.get_correct_attn_implementation("eager") == "eager"
