"""MultiheadAttention against torch.nn's, over its options, in fp64."""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
from torch import nn

from fastattn.nn import MultiheadAttention

B, H, SQ, SK, E = 2, 3, 5, 7, 12
CONSTRUCTIONS = {
    "plain": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv_zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "kdim_vdim": {"kdim": 8, "vdim": 10},
    "kdim_bias_kv": {"kdim": 8, "add_bias_kv": True},
}
MASKS = ("none", "padding", "padding_float", "bool", "float", "bool_3d", "float_3d")


def close(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Equal up to the rounding of fp64 sums; a NaN is a failure."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def pair(**options) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours with the same, nowhere zero, parameters."""
    options = {"embed_dim": E, "num_heads": H, "dtype": torch.float64, **options}
    theirs, ours = nn.MultiheadAttention(**options), MultiheadAttention(**options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.uniform_(-0.5, 0.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def masks(kind: str, batch: int | None = B, seq_q: int = SQ, seq_k: int = SK) -> dict[str, object]:
    """Masks in torch.nn's meaning; every query keeps its first key."""
    padding = torch.rand(batch or 1, seq_k) < 0.4
    padding[:, 0] = False
    if batch is None:
        padding = padding[0]
    lead = ((batch or 1) * H,) if kind.endswith("3d") else ()
    blocked = torch.rand(*lead, seq_q, seq_k) < 0.4
    blocked[..., 0] = False
    added = torch.randn(*blocked.shape, dtype=torch.float64).masked_fill(blocked, -torch.inf)
    found: dict[str, object] = {}
    if "padding" in kind:
        is_float = "padding_float" in kind
        found["key_padding_mask"] = torch.randn(padding.shape).double() if is_float else padding
    if "bool" in kind:
        found["attn_mask"] = blocked
    elif kind.startswith("float") or "+float" in kind:
        found["attn_mask"] = added
    return found


def inputs(module: nn.MultiheadAttention, batch: int | None = B) -> list[torch.Tensor]:
    def shape(seq: int, width: int) -> tuple[int, ...]:
        if batch is None:
            return (seq, width)
        return (batch, seq, width) if module.batch_first else (seq, batch, width)

    sizes = ((SQ, E), (SK, module.kdim), (SK, module.vdim))
    return [torch.randn(*shape(*s), dtype=torch.float64, requires_grad=True) for s in sizes]


def compare(
    theirs: nn.MultiheadAttention,
    ours: MultiheadAttention,
    tensors: list[torch.Tensor],
    **call,
) -> None:
    """Outputs, weights, and the gradients of inputs and parameters."""
    for module in (theirs, ours):
        module.zero_grad()
    copies = {id(x): x.detach().clone().requires_grad_() for x in tensors}
    others = [copies[id(x)] for x in tensors]
    expected, expected_weights = theirs(*tensors, **call)
    out, weights = ours(*others, **call)
    close(out, expected)
    close(weights, expected_weights)
    grad = torch.randn_like(expected)
    for x, w, inp in ((expected, expected_weights, tensors), (out, weights, others)):
        for t in inp:
            t.grad = None
        loss = (x * grad).sum() + (0.0 if w is None else (w**2).sum())
        loss.backward()
    for a, b in zip(others, tensors, strict=True):
        close(a.grad, b.grad)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.grad, b.grad)


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
    """The error policy: at most twice the error of torch's own result plus 2 ulp, against fp64."""
    torch.manual_seed(6)
    exact, ours = pair(embed_dim=64, num_heads=4, batch_first=True)
    theirs = copy.deepcopy(exact).to(dtype)
    ours = ours.to(dtype)
    x = torch.randn(2, 33, 64).to(dtype)
    exact.load_state_dict({k: v.double() for k, v in theirs.state_dict().items()})
    want = exact(*[x.double()] * 3, need_weights=False)[0]
    out = ours(x, x, x, need_weights=False)[0]
    assert out.dtype == dtype
    torch_error = (theirs(x, x, x, need_weights=False)[0].double() - want).abs().max()
    bound = 2 * torch_error + 2 * torch.finfo(dtype).eps * want.abs().max()
    error = (out.double() - want).abs().max()
    assert error <= bound, f"{error} > {bound}"


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
