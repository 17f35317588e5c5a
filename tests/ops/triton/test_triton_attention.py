"""The Triton attention kernels against the oracle in float64: every option, forward and gradients,
over small odd shapes."""

from __future__ import annotations

import math

import pytest
import torch
from attention_call import AttentionCall
from pairs import every_pair
from torch import Tensor

import fastattn
from fastattn import ops, reference
from fastattn.ops import triton
from fastattn.ops.triton import config
from fastattn.testing import OPTIONS, assert_close, make_mask

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# batch, heads_q, heads_k, seq_q, seq_k, head_dim, head_dim_v
SHAPES = {
    "square": (1, 2, 2, 33, 33, 16, 16),
    "grouped, long": (2, 4, 2, 17, 63, 24, 8),
    "more queries": (1, 3, 1, 41, 19, 3, 40),
    "one query": (1, 1, 1, 1, 37, 64, 64),
}
CHOSEN = (
    "plain", "causal", "window", "left window, causal", "softcap", "alibi",
    "dropout", "negative scale", "everything",
)  # fmt: skip
# For masks, with fewer heads: the interpreter takes some 10 ms for a program.
MASKED_SHAPES = {
    "grouped, two batches": (2, 2, 1, 17, 37, 24, 8),
    "more queries": (1, 3, 1, 41, 19, 3, 40),
}
MASKS = ("padding", "blocks", "shared float, hidden", "key bias", "row bias", "head bias")


def bound(dtype: torch.dtype, scale: Tensor | float, factor: float) -> Tensor | float:
    """Rounding of a result of this size, and of float32 sums within it."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    unit = torch.finfo(dtype).eps + 16 * torch.finfo(accumulator).eps
    return factor * unit * scale


def run_and_check(shape, options, mask_kind, dtype, device, aligned=False) -> None:
    batch, heads_q, heads_k, seq_q, seq_k, dim, dim_v = shape
    pad = 0 if aligned else 3
    q = torch.randn(batch, seq_q, heads_q, dim + pad, dtype=dtype, device=device)
    q = q[..., pad : dim + pad].transpose(1, 2)
    k = torch.randn(batch, seq_k, heads_k, dim, dtype=dtype, device=device).transpose(1, 2)
    v = torch.randn(batch, heads_k, seq_k, dim_v, dtype=dtype, device=device)
    mask = make_mask(mask_kind, (batch, heads_q, seq_q, seq_k), dtype, device)
    options = dict(options)
    if options.get("alibi_slopes"):
        options["alibi_slopes"] = torch.rand(batch, heads_q, device=device)
    seed = torch.tensor([-(2**40) - 12345], device=device) if "dropout_p" in options else None
    options = {"scale": dim**-0.5} | options | {"seed": seed}
    call = AttentionCall(q, k, v, mask, backend="triton", **options)
    out, lse, *_ = call.forward()

    wide = [x.double() if x is not None and x.dtype == dtype else x for x in (q, k, v, mask)]
    expected_out, expected_lse = reference.attention_forward(*wide, **options)
    size = wide[2].abs().max() / (1 - options.get("dropout_p", 0.0))
    assert_close("out", out, expected_out, bound(dtype, size.cpu(), 2))
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close("lse", lse, expected_lse, bound(lse.dtype, 8, 1))

    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = call.backward(grad_out, grad_lse)
    expected = reference.attention_backward(
        grad_out.double(), grad_lse.double(), *wide, expected_out, expected_lse,
        needs=[True, True, True, call.has_float_mask], **options,
    )  # fmt: skip
    for name, actual, wanted in zip(("dq", "dk", "dv", "dmask"), grads, expected, strict=True):
        if wanted is None:
            assert actual.numel() == 0
            continue
        assert_close(name, actual, wanted, bound(dtype, wanted.abs().max().cpu() + 1, 8))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", CHOSEN)
def test_options(options, shape, device):
    run_and_check(shape, OPTIONS[options], "none", torch.float32, device)


@pytest.mark.parametrize(
    "mask, options, shape",
    every_pair(MASKS, ["plain", "left window, causal", "dropout", "everything"], MASKED_SHAPES),
)
def test_masks(mask, options, shape, device):
    run_and_check(MASKED_SHAPES[shape], OPTIONS[options], mask, torch.float32, device)


@pytest.mark.parametrize(
    "dtype, mask, options",
    every_pair(DTYPES, ["none", "blocks", "shared float, hidden"], ["plain", "everything"]),
)
def test_dtypes(dtype, mask, options, device):
    run_and_check((1, 4, 2, 17, 37, 24, 8), OPTIONS[options], mask, dtype, device)


@pytest.mark.parametrize("dims", [(1, 1), (128, 16), (40, 256)], ids=str)
def test_head_dims(dims, device):
    run_and_check((1, 1, 1, 18, 21, *dims), {"is_causal": True}, "none", torch.float32, device)


@pytest.mark.parametrize(
    "options, mask, shape",
    every_pair(
        ["plain", "window", "everything"],
        ["none", "blocks", "shared float, hidden"],
        ["grouped, long", "square"],
    ),
)
def test_tensor_descriptors(options, mask, shape, device, monkeypatch):
    """16-bit operands of aligned rows on Hopper; the interpreter takes any that are aligned."""
    from fastattn.ops.triton import problem

    monkeypatch.setattr(config, "INTERPRETED", config.INTERPRETED._replace(tma=True))
    used = []
    make = problem.TensorDescriptor.from_tensor
    monkeypatch.setattr(
        problem.TensorDescriptor, "from_tensor", lambda *a: used.append(a) or make(*a)
    )
    dtype = torch.float32 if triton.interpreting() else torch.bfloat16
    run_and_check(SHAPES[shape], OPTIONS[options], mask, dtype, device, aligned=True)
    hopper = triton.interpreting() or torch.cuda.get_device_capability()[0] in (9, 10)
    assert len(used) == (6 if hopper else 0)


@pytest.mark.parametrize("change", ["offset", "odd rows", "broadcast"])
def test_what_tensor_descriptors_cannot_do_goes_by_pointers(change, device, monkeypatch):
    monkeypatch.setattr(config, "INTERPRETED", config.INTERPRETED._replace(tma=True))
    q, k, wide = (torch.randn(1, 2, 20, n, device=device).half() for n in (16, 16, 24))
    v = {
        "offset": wide[..., 2:18],
        "odd rows": wide[..., :17].contiguous()[..., :16],
        "broadcast": wide[:, :1, :, :16].expand(1, 2, 20, 16),
    }[change]
    out = AttentionCall(q, k, v, is_causal=True, scale=0.3, backend="triton").forward()[0]
    expected, _ = reference.attention(q.double(), k.double(), v.double(), is_causal=True, scale=0.3)
    assert_close("out", out, expected, bound(v.dtype, v.abs().max().cpu(), 2))


@pytest.mark.skipif(not triton.interpreting(), reason="compares with the CPU kernels")
@pytest.mark.native
def test_dropout_is_the_cpu_kernels(device):
    """With V the identity the output shows the mask."""
    q, k = torch.randn(2, 3, 21, 8), torch.randn(2, 3, 34, 8)
    v = torch.eye(34).expand(2, 3, 34, 34)
    seed = torch.tensor([2**62 - 987654321])
    options = {"seed": seed, "scale": 0.3, "dropout_p": 0.4}
    out = AttentionCall(q, k, v, backend="triton", **options).forward()[0]
    expected = AttentionCall(q, k, v, **options).forward()[0]
    assert torch.equal(out == 0, expected == 0)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", ["bool", "float", "causal", "window"])
def test_keys_hidden_from_every_query_never_matter(kind, device):
    q, k, v = (torch.randn(1, 2, 40, 16, device=device) for _ in range(3))
    mask, options = None, {}
    hidden = torch.zeros(40, dtype=torch.bool, device=device)
    if kind in ("bool", "float"):
        hidden[30:] = hidden[3] = True
        mask = ~hidden[None, None, None] if kind == "bool" else torch.zeros(1, 1, 1, 40)
        if kind == "float":
            mask = mask.to(device).masked_fill(hidden, -math.inf)
    else:
        q = q[:, :, :20]  # rows that see no key from 22 on
        hidden[20 if kind == "causal" else 22 :] = True
        options = {"window_size": (-1, 2)} if kind == "window" else {"is_causal": True}
    call = AttentionCall(q, k, v, mask, scale=0.25, backend="triton", **options)
    clean = call.forward()
    k[:, :, hidden], v[:, :, hidden] = math.nan, math.inf
    results = call.forward()
    torch.testing.assert_close(results, clean)
    grads = call.backward(torch.ones_like(results[0]))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][:, :, hidden].any()
    assert not grads[2][:, :, hidden].any()


def test_empty_rows_with_nan_harm_nobody(device):
    q, k, v = (torch.randn(1, 1, 20, 8, device=device) for _ in range(3))
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool, device=device)
    mask[:, :, 5] = False
    q[:, :, 5] = math.nan
    call = AttentionCall(q, k, v, mask, scale=0.3, backend="triton")
    out, lse, *_ = call.forward()
    assert not out[0, 0, 5].any()
    assert lse[0, 0, 5] == -math.inf
    grad = torch.randn_like(out)
    grad[:, :, 5] = math.inf
    grads = call.backward(grad)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][0, 0, 5].any()


def test_a_nan_in_a_used_key_stays(device):
    q, k, v = (torch.randn(1, 1, 9, 8, device=device) for _ in range(3))
    k[0, 0, 4, 2] = math.nan
    call = AttentionCall(q, k, v, is_causal=True, scale=0.3, backend="triton")
    out, lse, *_ = call.forward()
    assert out[0, 0, 4:].isnan().all()
    assert lse[0, 0, 4:].isnan().all()


def test_a_mask_of_the_lowest_number_weighs_all_keys_alike(device):
    q, k, v = (torch.randn(1, 1, 20, 16, device=device) for _ in range(3))
    mask = torch.zeros(1, 1, 20, 20, device=device)
    mask[..., 7, :] = torch.finfo(torch.float32).min
    out = AttentionCall(q, k, v, mask, scale=0.25, backend="triton").forward()[0]
    torch.testing.assert_close(out[..., 7, :], v.mean(-2))


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (1, 1, 3, 4), (1, 2, 3, 0)], ids=str
)
def test_sizes_of_zero(shape, device):
    q = torch.randn(shape, device=device)
    k = v = torch.randn(shape if shape[0] != 1 or not shape[3] else (1, 1, 0, 4), device=device)
    mask = torch.zeros([1] * 4, device=device)
    call = AttentionCall(q, k, v, mask, scale=0.5, backend="triton")
    out, lse, *_ = call.forward()
    expected = reference.attention_forward(q, k, v, mask, scale=0.5)
    torch.testing.assert_close((out, lse), expected)
    grads = call.backward(out)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape, mask.shape]
    assert not any(g.any() for g in grads)


def test_more_than_one_batch_dimension(device):
    q, k, v = (torch.randn(2, 1, 3, 2, 20, 8, device=device) for _ in range(3))
    mask = torch.randn(1, 1, 3, 1, 20, 1, device=device)
    call = AttentionCall(q, k, v, mask, scale=0.4, backend="triton")
    out, lse, *_ = call.forward()
    wide = [x.double() for x in (q, k, v, mask)]
    expected = reference.attention_forward(*wide, scale=0.4)
    torch.testing.assert_close((out.double(), lse.double()), expected, atol=1e-5, rtol=1e-5)
    grads = call.backward(out)
    wanted = reference.attention_backward(out.double(), None, *wide, *expected, scale=0.4)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "dropout_p": 0.3}], ids=str)
def test_packed_sequences(options, device):
    lengths_q, lengths_k = [3, 0, 20, 17], [4, 2, 33, 1]
    starts_q, starts_k = (
        torch.tensor([0, *n], device=device).cumsum(0).int() for n in (lengths_q, lengths_k)
    )
    q = torch.randn(sum(lengths_q), 4, 8, device=device, requires_grad=True)
    k = torch.randn(sum(lengths_k), 2, 8, device=device, requires_grad=True)
    v = torch.randn(sum(lengths_k), 2, 5, device=device, requires_grad=True)
    torch.manual_seed(5)
    out, lse = fastattn.varlen_attn(
        q, k, v, starts_q, starts_k, 20, 33, return_lse=True, backend="triton", **options
    )
    assert out.is_contiguous()
    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (1,), device=device)
    outs, lses = [], []
    longest = [
        torch.cat([x, x.new_zeros(40 - x.shape[0], *x.shape[1:])])
        for x in [*q.split(lengths_q), *k.split(lengths_k), *v.split(lengths_k)]
    ]
    padded_q, padded_k, padded_v = (
        torch.stack(longest[4 * n : 4 * n + 4]).transpose(1, 2) for n in range(3)
    )
    mask = torch.arange(40, device=device) < torch.tensor(lengths_k, device=device)[:, None]
    outs, lses = reference.attention(
        padded_q, padded_k, padded_v, mask[:, None, None], seed=seed, **options
    )
    expected = torch.cat([outs[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths_q)])
    expected_lse = torch.cat([lses[b, :, :n] for b, n in enumerate(lengths_q)], 1)
    torch.testing.assert_close((out, lse), (expected, expected_lse), atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(out), torch.randn_like(lse)
    grads, wanted = (
        torch.autograd.grad([(a * w).sum() for a, w in zip(pair, weights, strict=True)], (q, k, v))
        for pair in ((out, lse), (expected, expected_lse))
    )
    torch.testing.assert_close(grads, wanted, atol=1e-5, rtol=1e-5)


def test_gradcheck(device):
    q, k, v = (
        torch.randn(1, h, s, 3, dtype=torch.float64, device=device, requires_grad=True)
        for h, s in ((2, 4), (1, 5), (1, 5))
    )
    bias = torch.randn(1, 2, 1, 5, dtype=torch.float64, device=device, requires_grad=True)

    def function(q, k, v, bias):
        torch.manual_seed(1)
        return fastattn.scaled_dot_product_attention(
            q, k, v, bias, 0.2, is_causal=True, enable_gqa=True, softcap=2.0, return_lse=True,
            backend="triton",
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (q, k, v, bias), fast_mode=True)


def test_the_same_call_is_bitwise_equal(device):
    q, k, v = (torch.randn(1, 2, 50, 16, device=device, requires_grad=True) for _ in range(3))
    runs = []
    for _ in range(2):
        out = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, backend="triton")
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compile_fullgraph(device):
    q, k, v = (torch.randn(1, 2, 20, 16, device=device, requires_grad=True) for _ in range(3))

    def function(q, k, v):
        return fastattn.scaled_dot_product_attention(
            q, k, v, is_causal=True, window_size=(4, 0), backend="triton"
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, compiled):
        out = f(q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    torch.testing.assert_close(*results)


BAD = [
    ("key", lambda a: a | {"key": a["key"][..., :7]}),
    ("key", lambda a: a | {n: a[n].repeat(1, 3, 1, 1)[:, :3] for n in ("key", "value")}),
    ("key", lambda a: a | {"key": a["key"].double()}),
    ("value", lambda a: a | {"value": a["value"][:, :, :4]}),
    ("query", lambda a: a | {"query": a["query"][0, 0]}),
    ("query", lambda a: a | {n: a[n].repeat(1, 1, 1, 40) for n in ("query", "key")}),
    ("attn_mask", lambda a: a | {"attn_mask": a["query"][..., :4]}),
    ("attn_mask", lambda a: a | {"attn_mask": a["query"][0, 0, :, :5]}),
    ("seed", lambda a: a | {"dropout_p": 0.5}),
    ("dropout_p", lambda a: a | {"dropout_p": 1.0}),
    ("scale", lambda a: a | {"scale": math.inf}),
    ("alibi_slopes", lambda a: a | {"slopes": a["query"].flatten()[:3]}),
]


@pytest.mark.parametrize("argument, change", BAD)
def test_a_direct_call_with_bad_metadata_raises(argument, change, device):
    q = torch.randn(1, 2, 5, 8, device=device)
    groups = (ops.Inputs(q, q, q), ops.Extras(), ops.Options())
    good = {name: x for group in groups for name, x in group._asdict().items()}
    with pytest.raises(RuntimeError, match=f"{argument}: expected .*, got"):
        torch.ops.fastattn_triton.attention_forward(**change(good))


def test_explain_names_the_reason(device):
    q = torch.randn(1, 2, 5, 300, device=device)
    explanation = fastattn.backends.explain("attention", q, q, q)
    assert explanation.reasons["triton"] == ["head dim 300 is above 256"]
    with pytest.raises(RuntimeError, match="head dim 300 is above 256"):
        fastattn.scaled_dot_product_attention(q, q, q, backend="triton")
