"""MultiheadAttention against torch.nn's, over its options, in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from beside_torch import CONSTRUCTIONS, MASKS, SQ, B, E, close, compare, inputs, masks, pair

from fastattn.testing import assert_accurate


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_options_and_masks(construction, mask, need_weights):
    torch.manual_seed(0)
    theirs, ours = pair(batch_first=need_weights, **CONSTRUCTIONS[construction])
    compare(theirs, ours, inputs(ours), need_weights=need_weights, **masks(mask))


@pytest.mark.parametrize("mask", ["padding+bool", "padding_float+float", "padding+bool_3d"])
@pytest.mark.parametrize("construction", ["plain", "bias_kv_zero_attn"])
def test_both_masks(construction, mask):
    torch.manual_seed(1)
    theirs, ours = pair(batch_first=True, **CONSTRUCTIONS[construction])
    for need_weights in (False, True):
        compare(theirs, ours, inputs(ours), need_weights=need_weights, **masks(mask))


def test_masks_of_mixed_kinds():
    torch.manual_seed(1)
    theirs, ours = pair(batch_first=True)
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        compare(theirs, ours, inputs(ours), need_weights=False, **masks("padding+float"))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", ["none", "padding", "bool", "float_3d", "padding+bool"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(batch_first, mask, average):
    torch.manual_seed(2)
    theirs, ours = pair(batch_first=batch_first)
    call = masks(mask, batch=None)
    compare(theirs, ours, inputs(ours, None), average_attn_weights=average, **call)
    compare(theirs, ours, inputs(ours, None), need_weights=False, **call)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_and_weight_average(batch_first, average):
    torch.manual_seed(3)
    theirs, ours = pair(batch_first=batch_first)
    x = torch.randn(B, B, E, dtype=torch.float64, requires_grad=True)
    compare(theirs, ours, [x, x, x], average_attn_weights=average)
    compare(theirs, ours, [x, x, x], need_weights=False)
    y = torch.randn(B, B, E, dtype=torch.float64, requires_grad=True)
    compare(theirs, ours, [x, y, y], need_weights=False)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_causal_hint(kind, padding, need_weights):
    torch.manual_seed(4)
    theirs, ours = pair(batch_first=True)
    x = torch.randn(B, SQ, E, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(SQ, SQ, dtype=torch.bool).triu(1)
    if kind == "float":
        mask = torch.zeros(SQ, SQ, dtype=torch.float64).masked_fill(mask, -torch.inf)
    call = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    if padding:
        padded = torch.zeros(B, SQ, dtype=torch.bool)
        padded[0, 3:] = True
        call["key_padding_mask"] = (
            padded if kind == "bool" else torch.zeros(B, SQ).double().masked_fill(padded, -1e3)
        )
    compare(theirs, ours, [x, x, x], **call)


def test_causal_hint_leaves_appended_keys_visible():
    torch.manual_seed(4)
    _, ours = pair(batch_first=True, add_bias_kv=True, add_zero_attn=True)
    x = torch.randn(B, SQ, E, dtype=torch.float64)
    mask = torch.ones(SQ, SQ, dtype=torch.bool).triu(1)
    hinted = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    close(hinted, ours(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("training", [True, False])
def test_inference_agrees_with_torchs_fast_path(training):
    torch.manual_seed(5)
    theirs, ours = pair(num_heads=2, batch_first=True)
    x = torch.randn(B, SQ, E, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.train(training)(x, x, x)
        out = ours.train(training)(x, x, x)
    close(out[0], expected[0])
    close(out[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_no_more_than_torchs(dtype):
    torch.manual_seed(6)
    exact, ours = pair(embed_dim=64, num_heads=4, batch_first=True)
    theirs = copy.deepcopy(exact).to(dtype)
    ours = ours.to(dtype)
    x = torch.randn(2, 33, 64).to(dtype)
    exact.load_state_dict({k: v.double() for k, v in theirs.state_dict().items()})
    want = exact(*[x.double()] * 3, need_weights=False)[0]
    out = ours(x, x, x, need_weights=False)[0]
    peer = theirs(x, x, x, need_weights=False)[0]
    assert_accurate("out", out.detach(), want.detach(), peer.detach())


@pytest.mark.parametrize("need_weights", [True, False])
def test_rows_with_nothing_to_attend_to(need_weights):
    torch.manual_seed(7)
    _, ours = pair(batch_first=True)
    x = torch.randn(B, SQ, E, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(B, SQ, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    close(out[1], ours.out_proj.bias.expand(SQ, E))
    if need_weights:
        assert (weights[1] == 0).all()
    out.sum().backward()
    assert not any(p.grad.isnan().any() for p in ours.parameters())
    assert (x.grad[1] == 0).all()
