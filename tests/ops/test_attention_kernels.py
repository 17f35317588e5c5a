"""The native attention ops against the oracle in float64, in every dtype, over odd shapes and all
masks."""

from __future__ import annotations

import math

import pytest
import torch
from attention_call import AttentionCall

from fastattn import _extension, reference
from fastattn.testing import OPTIONS, assert_close, make_mask, unit_roundoff

pytestmark = pytest.mark.native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# batch, heads_q, heads_k, seq_q, seq_k, head_dim, head_dim_v
SHAPES = [
    (2, 4, 4, 17, 17, 16, 16),
    (1, 4, 2, 63, 111, 64, 64),
    (2, 2, 1, 257, 300, 40, 24),
    (1, 1, 1, 1, 65, 128, 64),
    (1, 1, 1, 5, 3, 1, 1),
    (2, 3, 3, 130, 513, 96, 200),
    (1, 2, 2, 400, 270, 256, 7),
    (2, 4, 2, 3, 700, 40, 24),  # few queries: keys pass by in place
    (1, 8, 1, 1, 300, 24, 48),
]
MASKS = (
    "none", "padding", "bool", "float", "shared float", "full float", "head and key bias",
    "empty rows",
)  # fmt: skip
# Windows narrower and wider than a block of 96 queries, of 192 or 256 keys.
CHOSEN = (
    "wide window", "left window", "wide left window, causal", "right window", "softcap", "alibi",
    "everything, wide window",
)  # fmt: skip


def takes_p_rounded(dtype: torch.dtype) -> bool:
    """Whether the products of the kernel set in use take P in bf16."""
    return dtype == torch.bfloat16 and _extension.cpu_isa() in ("avx512bf16", "emulated")


def run_and_check(dtype, shape, mask_kind, options) -> None:
    batch, heads_q, heads_k, seq_q, seq_k, dim, dim_v = shape
    # Strided views: heads and sequence swapped, an offset, a slice of a wider buffer.
    q = torch.randn(batch, seq_q, heads_q, dim + 3, dtype=dtype)[..., 2 : dim + 2].transpose(1, 2)
    k = torch.randn(batch, seq_k, heads_k, dim, dtype=dtype).transpose(1, 2)
    v = torch.randn(batch, heads_k, seq_k, dim_v, dtype=dtype)
    mask = make_mask(mask_kind, (batch, heads_q, seq_q, seq_k), dtype)
    options = dict(options)
    if options.get("alibi_slopes"):
        options["alibi_slopes"] = torch.rand(batch, heads_q) / 4
    p = options.get("dropout_p", 0.0)
    options |= {"scale": dim**-0.5, "seed": torch.tensor([2**40 + 17]) if p else None}
    wide = [x.double() if x is not None and x.dtype == dtype else x for x in (q, k, v, mask)]

    call = AttentionCall(q, k, v, mask, **options)
    out, lse, *_ = call.forward()
    expected_out, expected_lse = reference.attention_forward(*wide, **options)
    # Rounding of the result, and of fp32 sums of S terms of the size of V.
    wider = torch.float64 if dtype == torch.float64 else torch.float32
    u, accumulator = unit_roundoff(dtype), unit_roundoff(wider)
    size = wide[2].abs().max() / (1 - p)
    bound = 2 * u * expected_out.abs() + 32 * accumulator * size
    if takes_p_rounded(dtype):  # each element: u * P |V|
        bound += u * reference.attention_forward(*wide[:2], wide[2].abs(), wide[3], **options)[0]
    assert_close("out", out, expected_out, bound)
    size = 1 + expected_lse.nan_to_num(0, 0, 0).abs()
    assert_close("lse", lse, expected_lse, 64 * accumulator * size)

    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = call.backward(grad_out, grad_lse)
    expected = reference.attention_backward(
        grad_out.double(),
        grad_lse.double(),
        *wide,
        expected_out,
        expected_lse,
        needs=[True, True, True, call.has_float_mask],
        **options,
    )
    for name, actual, wanted in zip(("dq", "dk", "dv", "dmask"), grads, expected, strict=True):
        if wanted is None:
            assert actual.numel() == 0
            continue
        # delta is summed from the rounded output: its error u * |dO . O| enters every dS of the
        # row.
        size = wanted.abs().max() + 1
        bound = 2 * u * wanted.abs() + (8 * u + 256 * accumulator) * size
        assert_close(name, actual, wanted, bound)


@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(dtype, shape, causal, mask_kind):
    run_and_check(dtype, shape, mask_kind, {"is_causal": causal})


@pytest.mark.parametrize("mask_kind", ["none", "padding", "shared float", "empty rows"])
@pytest.mark.parametrize("options", CHOSEN)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_options(shape, options, mask_kind):
    run_and_check(torch.float32, shape, mask_kind, OPTIONS[options])


@pytest.mark.parametrize("options", CHOSEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_options_in_every_dtype(dtype, options):
    run_and_check(dtype, (2, 4, 2, 210, 300, 40, 24), "bool", OPTIONS[options])


@pytest.mark.parametrize("options", ["plain", "everything, wide window"])
@pytest.mark.parametrize("threads", [1, 2])
def test_packed_sequences(threads, options):
    """Of lengths that are 0, shorter and longer than a block, in q and in k."""
    lengths_q, lengths_k = [5, 0, 130, 97, 1, 40], [9, 3, 260, 0, 300, 40]
    starts_q, starts_k = (
        torch.tensor([0, *n]).cumsum(0).to(dtype)
        for n, dtype in ((lengths_q, torch.int32), (lengths_k, torch.int64))
    )
    q = torch.randn(sum(lengths_q), 4, 24)
    k = torch.randn(sum(lengths_k), 2, 24)
    v = torch.randn(sum(lengths_k), 2, 40)
    per_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
    chosen = dict(OPTIONS[options])
    slopes = torch.rand(6, 4) / 4 if chosen.pop("alibi_slopes", False) else None
    options = chosen | {"scale": 0.2, "alibi_slopes": slopes}
    options["seed"] = torch.tensor([99]) if "dropout_p" in chosen else None
    call = AttentionCall(*per_head, starts=(starts_q, starts_k), max_q=130, max_k=300, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, lse, *_ = call.forward()
        grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
        grads = call.backward(grad_out, grad_lse)
    finally:
        torch.set_num_threads(before)
    assert out.transpose(1, 2).is_contiguous()
    assert all(g.transpose(1, 2).is_contiguous() for g in grads[:3])
    for b in range(6):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        ours = [x[:, :, part] for x, part in zip(per_head, (rows, keys, keys), strict=True)]
        # Dropout counts batch elements: the oracle's sequence b of six.
        wide = [x.double().expand(6, *x.shape[1:]) for x in ours]
        expected, expected_lse = reference.attention_forward(*wide, None, **options)
        assert_close("out", out[0, :, rows], expected[b], 1e-5)
        assert_close("lse", lse[0, :, rows], expected_lse[b], 1e-5)
        wanted = reference.attention_backward(
            grad_out[:, :, rows].double().expand_as(expected),
            grad_lse[:, :, rows].double().expand_as(expected_lse),
            *wide, None, expected, expected_lse, needs=[True] * 3 + [False], **options,
        )  # fmt: skip
        for name, g, w, part in zip(
            ("dq", "dk", "dv"), grads, wanted, (rows, keys, keys), strict=False
        ):
            size = 1 + w[b].abs().max() if w[b].numel() else 1.0
            assert_close(name, g[0, :, part], w[b], 1e-4 * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_the_philox_mask_of_the_oracle(dtype):
    q, k, v = (torch.randn(2, 3, 70, 32, dtype=dtype) for _ in range(3))
    seed = torch.tensor([-1234567890123456789])
    options = dict(seed=seed, is_causal=True, scale=0.2, dropout_p=0.3)
    call = AttentionCall(q, k, v, **options)
    out, *_ = call.forward()
    wide = [x.double() for x in (q, k, v)]
    expected, expected_lse = reference.attention_forward(*wide, None, **options)
    tolerance = 8 * unit_roundoff(dtype) + 64 * unit_roundoff(torch.float32)
    assert_close("out", out, expected, tolerance * (1 + expected.abs()))
    grad = torch.randn_like(out)
    grads = call.backward(grad)
    wanted = reference.attention_backward(
        grad.double(), None, *wide, None, expected, expected_lse, **options
    )
    for name, a, b in zip(("dq", "dk", "dv"), grads, wanted, strict=False):
        assert_close(name, a, b, 4 * tolerance * (1 + b.abs().max()))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_keys_hidden_from_every_query_never_matter(kind, poison):
    q, k, v = (torch.randn(1, 4, 40, 16) for _ in range(3))
    hidden = torch.zeros(1, 4, 1, 40, dtype=torch.bool)
    hidden[:, :2, :, 30:] = True  # each head hides its own keys
    hidden[:, 2:, :, :7] = True
    mask = ~hidden if kind == "bool" else torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)
    call = AttentionCall(q, k, v, mask, scale=0.25)
    clean = call.forward()
    for x in (k, v):
        x[:, :2, 33] = poison
        x[:, 2:, 3] = poison
    results = call.forward()
    torch.testing.assert_close(results, clean)
    grads = call.backward(torch.ones_like(results[0]), needs=[True] * 3 + [False])
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][:, :2, 30:].any()
    assert not grads[2][:, :2, 30:].any()


def test_a_nan_in_a_used_key_stays():
    q, k, v = (torch.randn(1, 1, 9, 8) for _ in range(3))
    k[0, 0, 4, 2] = math.nan
    out, lse, *_ = AttentionCall(q, k, v, is_causal=True, scale=0.3).forward()
    assert out[0, 0, 4:].isnan().all()
    assert lse[0, 0, 4:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_mask_of_the_lowest_number_weighs_all_keys_alike(dtype):
    """finfo.min instead of -inf is common; a row of nothing else is no empty row."""
    q, k, v = (torch.randn(1, 2, 30, 16, dtype=dtype) for _ in range(3))
    mask = torch.zeros(1, 1, 30, 30, dtype=dtype)
    mask[..., 20:] = torch.finfo(dtype).min
    mask[..., 7, :] = torch.finfo(dtype).min
    out, lse, *_ = AttentionCall(q, k, v, mask, scale=0.25).forward()
    torch.testing.assert_close(out[..., 7, :], v.mean(-2))
    assert lse[0, 0, 7] == torch.tensor(torch.finfo(dtype).min, dtype=lse.dtype)
    expected = reference.attention_forward(q, k, v, mask, scale=0.25)[0]
    rounded = {
        "atol": unit_roundoff(dtype) * v.abs().max().item(),
        "rtol": 0.016,
    }  # 0.016: the default
    torch.testing.assert_close(out, expected, **(rounded if takes_p_rounded(dtype) else {}))


def test_an_empty_row_with_nan_harms_nobody():
    q, k, v = (torch.randn(1, 1, 20, 8) for _ in range(3))
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    mask[:, :, 5] = False
    q[:, :, 5] = math.nan
    call = AttentionCall(q, k, v, mask, scale=0.3)
    out, lse, *_ = call.forward()
    assert not out[0, 0, 5].any()
    assert lse[0, 0, 5] == -math.inf
    grad = torch.randn_like(out)
    grad[:, :, 5] = math.inf
    grads = call.backward(grad)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][0, 0, 5].any()


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (1, 1, 3, 4)],
    ids=["no batch", "no heads", "no queries", "no keys"],
)
def test_sizes_of_zero(shape):
    q = torch.randn(shape)
    k = v = torch.randn(shape) if shape[0] != 1 else torch.randn(1, 1, 0, 4)
    mask = torch.zeros([1] * 4)
    call = AttentionCall(q, k, v, mask, scale=0.5)
    out, lse, *_ = call.forward()
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == -math.inf).all()
    grads = call.backward(out)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape, mask.shape]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("mask_kind", ["none", "padding", "float", "nothing"])
def test_few_queries_split_their_keys_over_the_threads(threads, mask_kind):
    q = torch.randn(2, 4, 2, 40)
    k, v = torch.randn(2, 2, 3000, 40), torch.randn(2, 2, 3000, 24)
    if mask_kind == "nothing":
        mask = torch.zeros(1, 1, 1, 3000, dtype=torch.bool)
    else:
        mask = make_mask(mask_kind, (2, 4, 2, 3000), torch.float32)
    if mask_kind == "padding":
        mask[0, ..., 5:] = False  # whole ranges have nothing
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [AttentionCall(q, k, v, mask, scale=0.2).forward() for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    wide = [x.double() if x is not None and x.dtype != torch.bool else x for x in (q, k, v, mask)]
    expected, expected_lse = reference.attention_forward(*wide, scale=0.2)
    assert_close("out", runs[0][0], expected, 1e-6)
    assert_close("lse", runs[0][1], expected_lse, 1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_call_is_bitwise_equal(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k, v = (torch.randn(1, 1, 700, 32) for _ in range(3))
        mask = torch.randn(1, 1, 1, 700)
        runs = []
        for _ in range(3):
            call = AttentionCall(q, k, v, mask, is_causal=True, scale=0.2)
            results = call.forward()
            runs.append((*results, *call.backward(*results[:2])))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    finally:
        torch.set_num_threads(before)


def test_more_than_one_batch_dimension_and_a_negative_scale():
    q, k, v = (torch.randn(2, 1, 3, 2, 20, 8) for _ in range(3))
    mask = torch.randn(1, 1, 3, 1, 20, 1)
    call = AttentionCall(q, k, v, mask, scale=-0.7)
    out, lse, *_ = call.forward()
    expected = reference.attention_forward(*(x.double() for x in (q, k, v, mask)), scale=-0.7)
    torch.testing.assert_close((out.double(), lse.double()), expected, atol=1e-5, rtol=1e-5)
    grads = call.backward(out)
    wanted = reference.attention_backward(
        out.double(), None, *(x.double() for x in (q, k, v, mask)), *expected, scale=-0.7
    )
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window_size": (1, 2)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_no_query_sees_may_be_nan(dtype, options):
    """The first unseen key is an odd one and shares a word with a seen one where bf16 goes in
    pairs; more rows than a decoding step has."""
    q, k, v = (torch.randn(1, 2, n, 16, dtype=dtype) for n in (15, 40, 40))
    seen = 15 if "is_causal" in options else 17
    call = AttentionCall(q, k, v, scale=0.25, **options)
    results = []
    for poison in (0.0, math.nan):
        k[:, :, seen:], v[:, :, seen:] = poison, poison
        found = call.forward()
        results.append([*found, *call.backward(torch.ones_like(found[0]))])
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, poisoned)
