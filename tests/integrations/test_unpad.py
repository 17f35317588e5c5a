"""Encoders that skip their padding give, at every token, what the padded ones give: outputs,
losses, gradients. Where they cannot, the padded batch runs."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fastattn
from fastattn import backends
from fastattn.backends import FastAttnWarning
from fastattn.integrations import unpad

transformers = pytest.importorskip("transformers")
from tiny_models import IDS, TEXT  # noqa: E402

pytestmark = pytest.mark.native
TINY = {**TEXT, **IDS, "intermediate_size": 48, "max_position_embeddings": 32}
TINY |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTIL = {"vocab_size": 99, "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48}
DISTIL |= {"dropout": 0.0, "attention_dropout": 0.0}
MODELS = {
    "AltCLIPTextModel": {**TINY, "project_dim": 8},
    "BertModel": TINY,
    "BertGenerationEncoder": TINY,
    "CamembertModel": TINY,
    "ChineseCLIPTextModel": TINY,
    "Data2VecTextModel": TINY,
    "DistilBertModel": DISTIL,
    "ElectraModel": {**TINY, "embedding_size": 16},
    "ErnieModel": TINY,
    "RobertaModel": TINY,
    "RobertaPreLayerNormModel": TINY,
    "RoCBertModel": {**TINY, "enable_pronunciation": False, "enable_shape": False},
    "XLMRobertaModel": TINY,
    "XLMRobertaXLModel": TINY,
}


def build(name: str = "BertModel", **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, name).config_class(**{**MODELS.get(name, TINY), **options})
    config._attn_implementation = "sdpa"
    return getattr(transformers, name)(config).double().eval()


def skipping(model: nn.Module) -> nn.Module:
    ours = copy.deepcopy(model)
    fastattn.patch(ours, unpad=True)
    return ours


LENGTHS = torch.tensor([[9], [2], [5], [7]])
MASKS = {
    "right": torch.arange(9) < LENGTHS,
    "left": torch.arange(9) >= 9 - LENGTHS,
    "holes": (torch.arange(9) % 2 == 0) | (torch.arange(9) < LENGTHS),
}
IDS_OF = torch.randint(5, 99, (4, 9), generator=torch.Generator().manual_seed(1))


def call(model: nn.Module, mask: Tensor = MASKS["right"], **more: object) -> Tensor:
    return model(input_ids=IDS_OF, attention_mask=mask.long(), **more).last_hidden_state


@pytest.fixture(autouse=True)
def unwarned() -> None:
    backends._warned.clear()


def without_padding(out: Tensor, mask: Tensor) -> bool:
    return bool((out[~mask] == 0).all())


@pytest.mark.parametrize("name", MODELS)
def test_a_known_encoder(name):
    stock = build(name).train()
    ours = skipping(stock)
    mask = MASKS["right"]
    weights = torch.randn(4, 9, 32, dtype=torch.float64)
    outs = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAttnWarning)
        for model in (stock, ours):
            outs.append(call(model)[..., :32])
            (outs[-1][mask] * weights[mask][:, : outs[-1].shape[-1]]).sum().backward()
    assert_close(outs[1][mask], outs[0][mask])
    if name != "AltCLIPTextModel":  # it normalises behind the encoder
        assert without_padding(outs[1], mask)
        assert not without_padding(outs[0], mask)
    for (path, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        if p.grad is not None:
            assert_close(q.grad, p.grad, rtol=1e-7, atol=1e-10, msg=path)


def test_every_known_class_is_tested():
    found = {type(m) for name in MODELS for m in build(name).modules()}
    known = {f"{kind.__module__}.{kind.__qualname__}" for kind in found} & unpad._KNOWN
    assert known == unpad._KNOWN


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
def test_tokens_may_be_anywhere(mask):
    stock = build()
    ours = skipping(stock)
    assert_close(call(ours, mask)[mask], call(stock, mask)[mask])
    assert without_padding(call(ours, mask), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_autocast(dtype):
    stock = build().float()
    ours = skipping(stock)
    mask, tolerance = MASKS["right"], {"rtol": 3e-2, "atol": 5e-2}
    expected = call(stock)[mask]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert_close(call(ours)[mask].float(), expected, **tolerance)
    assert_close(call(ours.to(dtype))[mask].float(), expected, **tolerance)


def test_the_loss_and_the_pooled_output_stay():
    stock = build("BertForSequenceClassification", num_labels=3)
    ours = skipping(stock)
    given = {"input_ids": IDS_OF, "attention_mask": MASKS["right"].long()}
    labels = torch.tensor([0, 1, 2, 0])
    a, b = (m(**given, labels=labels) for m in (stock, ours))
    assert_close(a.loss, b.loss)
    assert_close(a.logits, b.logits)
    tagger = build("BertForTokenClassification", num_labels=3)
    labels = torch.where(MASKS["right"], IDS_OF % 3, -100)
    a, b = (m(**given, labels=labels) for m in (tagger, skipping(tagger)))
    assert_close(a.loss, b.loss)


def test_dropout_repeats_with_the_seed_and_checkpoints():
    stock = build(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).float().train()
    ours = skipping(stock)

    def gradients() -> list[Tensor]:
        ours.zero_grad()
        torch.manual_seed(3)
        call(ours).square().sum().backward()
        return [p.grad.clone() for p in ours.parameters() if p.grad is not None]

    first = gradients()
    assert_close(gradients(), first)
    ours.gradient_checkpointing_enable()
    assert_close(gradients(), first)


def test_double_backward():
    padded = build("BertModel", num_hidden_layers=1)
    ours = skipping(padded)
    fastattn.patch(padded)  # torch's fused attention has no second derivative
    norms = []
    for model in (padded, ours):
        parameters = [p for n, p in model.named_parameters() if "encoder" in n]
        out = call(model)[MASKS["right"]].square().sum()
        grads = torch.autograd.grad(out, parameters, create_graph=True)
        norm = sum(g.square().sum() for g in grads)
        norms.append(torch.autograd.grad(norm, parameters))
    assert_close(norms[1], norms[0], rtol=1e-6, atol=1e-9)


class Neighbours(nn.Module):
    """Adds each token's neighbour, and says whether the batch was padded."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x.roll(1, 1)


def hooked(model: nn.Module) -> None:
    model.encoder.layer[0].register_forward_hook(lambda *given: None)


def replaced(model: nn.Module) -> None:
    attention = model.encoder.layer[1].attention.self
    attention.query = Neighbours(attention.query)


def own_forward(model: nn.Module) -> None:
    layer = model.encoder.layer[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def on_sdpa(model: nn.Module) -> None:
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    "edit, reason",
    [(hooked, "has hooks"), (replaced, "Neighbours is not known"),
     (own_forward, "a forward of its own"), (on_sdpa, "attention is not fastattn's")],
)  # fmt: skip
def test_a_model_edited_after_patch_runs_padded(edit, reason):
    ours, stock = skipping(build()), build()
    edit(ours)
    edit(stock)
    with pytest.warns(FastAttnWarning, match=f"BertEncoder runs padded: .*{reason}"):
        out = call(ours)
    expected, mask = call(stock), MASKS["right"]
    assert_close(out[mask], expected[mask])
    assert not without_padding(out, mask)


def test_hidden_states_are_those_of_the_padded_batch():
    stock = build()
    ours = skipping(stock)
    mask = MASKS["right"]
    states = [
        m(input_ids=IDS_OF, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        for m in (stock, ours)
    ]
    for expected, got in zip(*states, strict=True):
        assert_close(got[mask], expected[mask])
    # The hooks that collected them stay, and collect nothing now.
    assert without_padding(call(ours), mask)


@pytest.mark.filterwarnings("ignore:unpad")
def test_other_masks_run_padded():
    stock = build()
    ours = skipping(stock)
    square = torch.rand(4, 1, 9, 9, generator=torch.Generator().manual_seed(2)) < 0.6
    square |= torch.eye(9, dtype=torch.bool)
    outs = [m(input_ids=IDS_OF, attention_mask=square).last_hidden_state for m in (stock, ours)]
    assert_close(outs[1], outs[0])
    empty = MASKS["right"].clone()
    empty[1] = False
    assert_close(call(ours, empty)[empty], call(stock, empty)[empty])
    assert not without_padding(call(ours, empty), empty)
    full = torch.ones(4, 9, dtype=torch.bool)
    assert_close(call(ours, full), call(stock, full))
    assert_close(ours(IDS_OF).last_hidden_state, stock(IDS_OF).last_hidden_state)


def test_a_decoder_runs_padded():
    stock = build("BertModel", is_decoder=True)
    ours = skipping(stock)
    mask = MASKS["right"]
    with pytest.warns(FastAttnWarning, match="its mask is not one of padding"):
        out = call(ours, use_cache=False)
    assert_close(out[mask], call(stock, use_cache=False)[mask])


def test_recorded_and_compiled_calls_run_padded():
    ours = skipping(build())
    expected, mask = call(ours), MASKS["right"]
    compiled = torch.compile(ours, backend="eager")
    assert_close(call(compiled)[mask], expected[mask])
    assert not without_padding(call(compiled), mask)


def test_a_version_that_gives_another_result_runs_padded(monkeypatch):
    ours = skipping(build())
    monkeypatch.setattr(unpad, "_packed", lambda packing: {})  # the sequences attend to each other
    with pytest.warns(FastAttnWarning, match="this version of transformers"):
        out = call(ours)
    mask = MASKS["right"]
    assert_close(out[mask], call(build())[mask])


def test_copies_pickles_and_unpatch():
    stock = build()
    ours = skipping(stock)
    expected, mask = call(ours), MASKS["right"]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_close(call(twin), expected)
        assert isinstance(twin.encoder, unpad.Unpadded)
    assert str(ours) == str(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    report = fastattn.unpatch(ours)
    assert ("BertEncoder without padding", "BertEncoder") in {
        (e.before, e.after) for e in report.swapped
    }
    assert type(ours.encoder) is type(stock.encoder)
    assert_close(call(ours), call(stock))
    assert not without_padding(call(ours), mask)


def test_the_report_says_what_runs_padded():
    mpnet = transformers.MPNetModel(transformers.MPNetConfig(**TINY))
    assert "unpad: no encoder" in str(fastattn.plan(mpnet, unpad=True).report)
    assert "unpad: no encoder" in str(fastattn.plan(nn.Linear(3, 3), unpad=True).report)
    eager = build()
    eager.set_attn_implementation("eager")
    report = fastattn.plan(eager, unpad=True).report
    assert "padding stays: its attention is not fastattn's" in str(report)
    planned = fastattn.plan(build(), unpad=True)
    assert "BertEncoder -> BertEncoder without padding" in str(planned)
    assert "without padding" not in str(fastattn.plan(build()))


def test_packed_sequences_in_transformers_own_arguments():
    from fastattn.integrations.transformers import attention_forward

    query, key, value = torch.randn(3, 1, 4, 10, 8, dtype=torch.float64)
    starts = torch.tensor([0, 3, 10], dtype=torch.int32)
    bidirectional, causal = nn.Module(), nn.Module()
    bidirectional.is_causal, causal.is_causal = False, True
    for module in (bidirectional, causal):
        out, _ = attention_forward(module, query, key, value, None, cu_seq_lens_q=starts)
        for a, b in ((0, 3), (3, 10)):
            parts = (x[:, :, a:b] for x in (query, key, value))
            expected, _ = attention_forward(module, *parts, None)
            assert_close(out[:, a:b], expected)
    two = torch.cat([query, query])
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected .* one row, got .* 2 rows"):
        attention_forward(causal, two, two, two, None, cu_seq_lens_q=starts)
    for name, x in (("sliding_window", 4), ("position_bias", torch.zeros(10, 10))):
        with pytest.raises(ValueError, match=f"{name}: expected None beside cu_seq_lens_q"):
            attention_forward(causal, query, key, value, None, cu_seq_lens_q=starts, **{name: x})


def test_bad_options():
    with pytest.raises(ValueError, match="unpad: expected False beside dropout=False, got True"):
        fastattn.patch(nn.Linear(2, 2), dropout=False, unpad=True)
    with pytest.raises(TypeError, match="unpad: expected a bool, got str"):
        fastattn.patch(nn.Linear(2, 2), unpad="yes")
