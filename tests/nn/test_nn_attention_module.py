"""MultiheadAttention as a module: sizes of zero, signature and state, dropout, hooks, autocast,
compilation, bad input."""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
from beside_torch import CONSTRUCTIONS, SK, SQ, B, E, H, close, pair
from torch import nn

from fastattn.nn import MultiheadAttention


@pytest.mark.parametrize(
    "batch, seq_q, seq_k", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=["batch", "queries", "keys"]
)
def test_sizes_of_zero(batch, seq_q, seq_k):
    _, ours = pair(batch_first=True)
    query = torch.randn(batch, seq_q, E, dtype=torch.float64)
    key = torch.randn(batch, seq_k, E, dtype=torch.float64)
    padding = torch.zeros(batch, seq_k, dtype=torch.bool)
    out, weights = ours(query, key, key, key_padding_mask=padding)
    assert out.shape == query.shape
    assert weights.shape == (batch, seq_q, seq_k)
    assert not out.isnan().any()


def test_layout_of_the_output_is_torchs():
    for batch_first in (True, False):
        theirs, ours = pair(batch_first=batch_first)
        x = torch.randn(4, 3, E, dtype=torch.float64)
        expected = theirs(x, x, x, need_weights=False)[0]
        out = ours(x, x, x, need_weights=False)[0]
        assert out.is_contiguous() or not expected.is_contiguous()


def test_signatures_are_torchs():
    for method in ("__init__", "forward"):
        names = [
            list(inspect.signature(getattr(cls, method)).parameters.values())
            for cls in (MultiheadAttention, nn.MultiheadAttention)
        ]
        assert [(p.name, p.default) for p in names[0]] == [(p.name, p.default) for p in names[1]]


def test_state_dict_and_initial_values_are_torchs():
    for options in CONSTRUCTIONS.values():
        torch.manual_seed(8)
        theirs = nn.MultiheadAttention(E, H, **options)
        torch.manual_seed(8)
        ours = MultiheadAttention(E, H, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
        theirs.load_state_dict(ours.state_dict(), strict=True)


def test_dropped_weights_made_the_output():
    torch.manual_seed(9)
    ours = MultiheadAttention(E, H, dropout=0.5, batch_first=True, dtype=torch.float64)
    x = torch.randn(B, SQ, E, dtype=torch.float64)
    out, weights = ours(x, x, x, average_attn_weights=False)
    kept = weights != 0
    assert 0 < kept.sum() < kept.numel()
    plain = ours.eval()(x, x, x, average_attn_weights=False)[1]
    close(weights[kept], 2 * plain[kept])
    value = x @ ours.in_proj_weight[2 * E :].T + ours.in_proj_bias[2 * E :]
    value = value.unflatten(-1, (H, E // H)).transpose(1, 2)
    close(out, ours.out_proj((weights @ value).transpose(1, 2).flatten(2)))


def test_fused_dropout_is_reproducible_and_right_in_the_mean():
    torch.manual_seed(10)
    ours = MultiheadAttention(E, H, dropout=0.2, batch_first=True)
    x = torch.randn(1, SQ, E)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(ours(x, x, x, need_weights=False)[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    with torch.no_grad():
        many = torch.stack([ours(x, x, x, need_weights=False)[0] for _ in range(2000)])
        expected = ours.eval()(x, x, x, need_weights=False)[0]
    # 6 standard errors over 60 outputs: one run in 10 million fails by chance.
    error = (many.mean(0) - expected).abs()
    assert (error < 6 * many.std(0) / len(many) ** 0.5).all()
    # torch's own spread, not only its mean
    theirs = nn.MultiheadAttention(E, H, dropout=0.2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        other = torch.stack([theirs(x, x, x, need_weights=False)[0] for _ in range(2000)])
    torch.testing.assert_close(many.std(0), other.std(0), rtol=0.2, atol=1e-3)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_of_everything(need_weights):
    ours = MultiheadAttention(E, H, dropout=1.0)
    x = torch.randn(3, 2, E)
    out, _ = ours(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(out, ours.out_proj.bias.expand_as(out))


def test_hooks_and_deepcopy():
    _, ours = pair(batch_first=True)
    seen = []
    ours.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    ours.register_full_backward_hook(lambda module, grads_in, grads_out: seen.append("backward"))
    other = copy.deepcopy(ours)
    x = torch.randn(B, SQ, E, dtype=torch.float64, requires_grad=True)
    ours(x, x, x)[0].sum().backward()
    assert seen == [x.shape, "backward"]
    assert type(other) is MultiheadAttention
    close(other(x, x, x)[0], ours(x, x, x)[0])
    assert other.in_proj_weight is not ours.in_proj_weight


def test_autocast():
    torch.manual_seed(11)
    _, ours = pair(batch_first=True, dtype=torch.float32)
    x = torch.randn(B, SQ, E)
    mask = torch.ones(SQ, SQ, dtype=torch.bool).triu(1)
    for need_weights, attn_mask in itertools.product((True, False), (None, mask, mask.float())):
        call = {"attn_mask": attn_mask, "need_weights": need_weights}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = ours(x, x, x, **call)[0]
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), ours(x, x, x, **call)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_compile_full_graph(training):
    torch.manual_seed(12)
    ours = MultiheadAttention(E, H, dropout=0.1, batch_first=True, add_bias_kv=True).train(training)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(B, SQ, E, requires_grad=True)
    padding = torch.zeros(B, SQ, dtype=torch.bool)
    padding[0, 3:] = True
    mask = torch.ones(SQ, SQ, dtype=torch.bool).triu(1)
    for need_weights in (True, False):
        call = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": need_weights}
        out, _ = compiled(x, x, x, **call)
        out.sum().backward()
        if not training:
            torch.testing.assert_close(out, ours(x, x, x, **call)[0])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": (B, SQ)}, ValueError, r"query: expected a last dimension of 12, got \(2, 5\)"),
        ({"query": (1, B, SQ, E)}, ValueError, r"query: expected 2 \(unbatched\) or 3 dimensions"),
        ({"key": (SK, E)}, ValueError, r"key: expected query's rank 3, got \(7, 12\)"),
        ({"key": (B + 1, SK, E)}, ValueError, r"value: expected key's \(3, 7\)"),
        ({"value": (B, SK, E + 1)}, ValueError, r"value: expected a last dimension of 12"),
        (
            {"key_padding_mask": (B, SK + 1)},
            ValueError,
            r"key_padding_mask: expected shape \(2, 7\)",
        ),
        ({"attn_mask": (SK, SQ)}, ValueError, r"attn_mask: expected shape \(5, 7\) or \(6, 5, 7\)"),
        ({"attn_mask": torch.int64}, TypeError, r"attn_mask: expected a bool .* got torch.int64"),
        ({"is_causal": True}, ValueError, r"attn_mask: expected the causal mask"),
        (
            {"query": torch.float32},
            TypeError,
            r"query: expected the parameters' dtype torch.float64",
        ),
    ],
)
def test_bad_input(change, error, message):
    _, ours = pair(batch_first=True)
    call: dict[str, object] = {
        "query": torch.randn(B, SQ, E, dtype=torch.float64),
        "key": torch.randn(B, SK, E, dtype=torch.float64),
        "value": torch.randn(B, SK, E, dtype=torch.float64),
    }
    for name, value in change.items():
        if isinstance(value, torch.dtype):
            call[name] = torch.zeros(B, SQ, E, dtype=value)
        elif isinstance(value, tuple):
            dtype = torch.bool if "mask" in name else torch.float64
            call[name] = torch.zeros(value, dtype=dtype)
        else:
            call[name] = value
    with pytest.raises(error, match=message):
        ours(**call)


def test_batch_sizes_must_agree():
    _, ours = pair(batch_first=True)
    query = torch.randn(B, SQ, E, dtype=torch.float64)
    key = torch.randn(B + 1, SK, E, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"key: expected query's batch size 2"):
        ours(query, key, key)
