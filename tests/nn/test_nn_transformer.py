"""TransformerEncoderLayer and TransformerEncoder against torch.nn's, in fp64."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.nn import MultiheadAttention, TransformerEncoder, TransformerEncoderLayer

B, S, E, H, FF = 2, 6, 8, 2, 20
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)


def close(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Equal up to the rounding of fp64 sums; a NaN is a failure."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def layers(**options) -> tuple[nn.TransformerEncoderLayer, TransformerEncoderLayer]:
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64, **options}
    theirs = nn.TransformerEncoderLayer(E, H, FF, **options)
    ours = TransformerEncoderLayer(E, H, FF, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases away from 0, norms away from 1
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def padding() -> torch.Tensor:
    padded = torch.zeros(B, S, dtype=torch.bool)
    padded[1, 4:] = True
    return padded


def compare(theirs: nn.Module, ours: nn.Module, *shape: int, **call) -> None:
    """Outputs and all gradients."""
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected, out = theirs(x, **call), ours(y, **call)
    close(out, expected)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    out.backward(grad)
    close(y.grad, x.grad)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.grad, b.grad)


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "nn.ReLU": nn.ReLU(),
    "nn.SiLU": nn.SiLU(),
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layer(activation, norm_first, bias):
    torch.manual_seed(0)
    activation = ACTIVATIONS[activation]
    theirs, ours = layers(activation=activation, norm_first=norm_first, bias=bias)
    compare(theirs, ours, B, S, E, src_key_padding_mask=padding())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "hint", "float", "3d"])
@pytest.mark.parametrize("padded", [True, False])
def test_layer_masks(batch_first, mask, padded):
    torch.manual_seed(1)
    theirs, ours = layers(batch_first=batch_first)
    call: dict[str, object] = {}
    if mask in ("causal", "hint"):
        call = {"src_mask": CAUSAL, "is_causal": mask == "hint"}
    elif mask == "float":
        call = {"src_mask": torch.randn(S, S, dtype=torch.float64)}
    elif mask == "3d":
        call = {"src_mask": torch.randn(B * H, S, S, dtype=torch.float64)}
    if padded:
        bias = torch.zeros(B, S, dtype=torch.float64).masked_fill(padding(), -torch.inf)
        call["src_key_padding_mask"] = bias if mask in ("float", "3d") else padding()
    compare(theirs, ours, *((B, S, E) if batch_first else (S, B, E)), **call)


def test_layer_unbatched():
    theirs, ours = layers()
    compare(theirs, ours, S, E)
    theirs.zero_grad()
    ours.zero_grad()
    compare(theirs, ours, S, E, src_key_padding_mask=padding()[1])


@pytest.mark.parametrize("norm_first", [True, False])
def test_eval_agrees_with_torchs_fast_path_where_it_keeps_values(norm_first):
    torch.manual_seed(2)
    theirs, ours = layers(norm_first=norm_first, dropout=0.3)
    theirs, ours = theirs.eval(), ours.eval()
    x = torch.randn(B, S, E, dtype=torch.float64)
    with torch.no_grad():
        close(ours(x), theirs(x))
        close(ours(x, src_mask=CAUSAL), theirs(x, src_mask=CAUSAL))
        used = ~padding()
        expected = theirs(x, src_key_padding_mask=padding())
        close(ours(x, src_key_padding_mask=padding())[used], expected[used])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal_bool", "causal_float", "other"])
def test_encoder(mask, training):
    torch.manual_seed(3)
    src_mask = {
        "none": None,
        "causal_bool": CAUSAL,
        "causal_float": nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64),
        "other": CAUSAL.T,
    }[mask]
    theirs, ours = (
        cls(layer, 3, nn.LayerNorm(E, dtype=torch.float64), enable_nested_tensor=False)
        for cls, layer in zip((nn.TransformerEncoder, TransformerEncoder), layers(), strict=True)
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    compare(theirs.train(training), ours.train(training), B, S, E, mask=src_mask)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_padded_positions_keep_ordinary_values_in_inference():
    """Where torch's nested path gives zeros; the other positions agree."""
    torch.manual_seed(4)
    layer, own_layer = layers()
    theirs, ours = nn.TransformerEncoder(layer, 2).eval(), TransformerEncoder(own_layer, 2).eval()
    x = torch.randn(B, S, E, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x, src_key_padding_mask=padding())
        out = ours(x, src_key_padding_mask=padding())
        training = theirs.train()(x, src_key_padding_mask=padding())
    close(out[~padding()], expected[~padding()])
    close(out, training)


@pytest.mark.parametrize(
    "mask, hint, causal",
    [
        (CAUSAL, None, True),
        (nn.Transformer.generate_square_subsequent_mask(S), None, True),
        (CAUSAL.T, None, False),
        (CAUSAL.expand(B * H, S, S), None, False),
        (CAUSAL, False, False),
        (None, None, False),
        (nn.Transformer.generate_square_subsequent_mask(S).requires_grad_(), None, False),
    ],
)
def test_a_causal_mask_takes_the_causal_kernel(monkeypatch, mask, hint, causal):
    seen = []
    whole = fastattn.functional.scaled_dot_product_attention

    def spy(q, k, v, mask, **options):
        seen.append((options["is_causal"], mask is None))
        return whole(q, k, v, mask, **options)

    monkeypatch.setattr(fastattn.functional, "scaled_dot_product_attention", spy)
    TransformerEncoder(TransformerEncoderLayer(E, H, FF, batch_first=True), 2)(
        torch.randn(B, S, E), mask=mask, is_causal=hint
    )
    assert seen == [(causal, causal or mask is None)] * 2


def test_encoder_takes_torchs_layer():
    theirs, _ = layers()
    encoder = TransformerEncoder(theirs, 2)
    assert all(type(layer) is nn.TransformerEncoderLayer for layer in encoder.layers)
    x = torch.randn(B, S, E, dtype=torch.float64)
    close(encoder(x), nn.TransformerEncoder(theirs, 2, enable_nested_tensor=False)(x))


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerEncoder"])
def test_classes_and_signatures_are_torchs(name):
    """Ours may have options more, by keyword alone."""
    ours, theirs = getattr(fastattn.nn, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    for method in ("__init__", "forward"):
        a, b = (
            [(p.name, p.default) for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
            for parameters in (
                inspect.signature(getattr(c, method)).parameters for c in (ours, theirs)
            )
        )
        assert a == b


def test_initial_values_are_torchs():
    torch.manual_seed(5)
    theirs = nn.TransformerEncoderLayer(E, H, FF)
    torch.manual_seed(5)
    ours = TransformerEncoderLayer(E, H, FF)
    assert type(ours.self_attn) is MultiheadAttention
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_feed_forward_uses_the_fused_functions(monkeypatch):
    seen = []
    for name in ("mlp", "linear", "dropout_add_norm", "activation_dropout"):
        whole = getattr(fastattn.functional, name)
        spy = lambda *a, name=name, whole=whole, **o: seen.append(name) or whole(*a, **o)  # noqa: E731
        monkeypatch.setattr(fastattn.functional, name, spy)
    x = torch.randn(B, S, E)
    layer = TransformerEncoderLayer(E, H, FF, dropout=0.1)
    norm = "dropout_add_norm"

    def called(layer: nn.Module) -> list[str]:
        seen.clear()
        layer(x)
        return seen

    assert called(layer) == [norm, "linear", norm]
    assert called(layer.eval()) == ["mlp"]
    layer.dropout.train()  # dropout kept on at inference
    assert called(layer) == ["linear"]
    layer.dropout.eval()
    layer.linear1.register_forward_hook(lambda *args: seen.append("hook"))
    assert called(layer) == ["hook"]
    options = {"dropout": 0.1, "norm_first": True}
    for activation in ("gelu", nn.GELU("tanh"), nn.SiLU(), F.relu):
        layer = TransformerEncoderLayer(E, H, FF, activation=activation, **options)
        assert called(layer) == [norm, "linear", "activation_dropout"]
    assert called(TransformerEncoderLayer(E, H, FF, activation=nn.Tanh(), **options)) == [
        norm, "activation_dropout",
    ]  # fmt: skip
    layer.norm2.register_forward_pre_hook(lambda *args: seen.append("hook"))
    assert called(layer) == ["hook", "linear"]


@pytest.mark.parametrize("child", ["linear1", "linear2", "dropout", "activation", "self_attn"])
def test_hooks_on_children_run(child):
    torch.manual_seed(6)
    layer = TransformerEncoderLayer(E, H, FF, dropout=0.0, activation=nn.ReLU())
    x, seen = torch.randn(S, B, E), []
    before = layer(x)
    getattr(layer, child).register_forward_hook(lambda *args: seen.append(child))
    torch.testing.assert_close(layer(x), before)
    assert seen == [child]


def test_dropout_is_reproducible_and_right_in_the_mean():
    torch.manual_seed(7)
    layer = TransformerEncoderLayer(E, H, FF, dropout=0.1, norm_first=True)
    x = torch.randn(S, 1, E)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(layer(x))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    # The feed-forward block is not linear in what attention drops, so torch's mean is the measure.
    theirs = nn.TransformerEncoderLayer(E, H, FF, dropout=0.1, norm_first=True)
    theirs.load_state_dict(layer.state_dict())
    with torch.no_grad():
        a, b = (torch.stack([m(x) for _ in range(1500)]) for m in (layer, theirs))
    error = (a.mean(0) - b.mean(0)).abs()
    # 6 standard errors over 48 outputs: one run in 10 million fails by chance.
    assert (error < 6 * ((a.var(0) + b.var(0)) / len(a)).sqrt()).all()


def test_deepcopy_keeps_class_and_values():
    encoder = TransformerEncoder(TransformerEncoderLayer(E, H, FF, dropout=0.0), 2)
    other = copy.deepcopy(encoder)
    x = torch.randn(S, B, E)
    assert torch.equal(encoder(x), other(x))
    assert type(other.layers[0].self_attn) is MultiheadAttention
    assert other.layers[0].linear1.weight is not encoder.layers[0].linear1.weight


def test_autocast_trains():
    torch.manual_seed(8)
    layer = TransformerEncoderLayer(E, H, FF, dropout=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(torch.randn(S, B, E)).float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_compile_full_graph(training):
    torch.manual_seed(9)
    layer = TransformerEncoderLayer(E, H, FF, dropout=0.1, batch_first=True)
    encoder = TransformerEncoder(layer, 2).train(training)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    x = torch.randn(B, S, E)
    out = compiled(x, mask=CAUSAL, src_key_padding_mask=padding())
    out.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    if not training:
        torch.testing.assert_close(out, encoder(x, mask=CAUSAL, src_key_padding_mask=padding()))


def test_an_optimizer_lowers_the_loss():
    torch.manual_seed(10)
    layer = TransformerEncoderLayer(E, H, FF, dropout=0.1)
    x, y = torch.randn(S, B, E), torch.randn(S, B, E)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_bad_input():
    layer = TransformerEncoderLayer(E, H, FF, batch_first=True)
    encoder = TransformerEncoder(layer, 1)
    x = torch.randn(B, S, E)
    with pytest.raises(ValueError, match=r"attn_mask: expected shape \(6, 6\) or \(4, 6, 6\)"):
        encoder(x, mask=torch.zeros(S, S + 1))
    with pytest.raises(
        ValueError, match=r"key_padding_mask: expected shape \(2, 6\), got \(6, 2\)"
    ):
        layer(x, src_key_padding_mask=padding().T)
    with pytest.raises(ValueError, match=r"attn_mask: expected the causal mask"):
        layer(x, is_causal=True)
    with pytest.raises(RuntimeError, match="activation should be relu/gelu"):
        TransformerEncoderLayer(E, H, activation="swish")
