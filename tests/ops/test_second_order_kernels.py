"""The native ops of forward mode and of the second derivative against the oracle in float64, in
every dtype, over options, odd shapes and absent tangents."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_call import AttentionCall
from torch import Tensor

from fastattn import ops, reference
from fastattn.testing import OPTIONS, assert_close, make_mask, unit_roundoff

pytestmark = pytest.mark.native
TESTS = str(Path(__file__).resolve().parents[1])

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# batch, heads_q, heads_k, seq_q, seq_k, head_dim, head_dim_v
SMALL = (2, 4, 2, 5, 7, 3, 2)
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 4, 17, 17, 16, 16),
    (1, 4, 2, 63, 111, 64, 64),
    (1, 2, 1, 130, 257, 33, 17),
    (1, 3, 3, 257, 111, 8, 65),
    (1, 1, 1, 200, 400, 128, 200),
]
CHOSEN = (
    "plain", "causal", "window", "softcap", "alibi", "dropout", "negative scale", "everything",
)  # fmt: skip
# Rows that see nothing, and keys that no query sees.
MASKS = ("none", *(f"{kind}, hidden" for kind in (
    "shared bool", "full float", "shared float", "key bias", "shared row bias",
)))  # fmt: skip
TANGENTS = ("qkvm", "q", "k", "v", "m", "")
NAMES = ("t_out", "t_lse", "g_query", "g_key", "g_value", "g_mask")


class Case:
    """A call's tensors, its tangents and cotangents, and what the oracle makes of them."""

    def __init__(self, dtype, shape, mask_kind="none", tangents="qkvm", **options) -> None:
        batch, heads_q, heads_k, seq_q, seq_k, dim, dim_v = shape
        self.q = torch.randn(batch, seq_q, heads_q, dim, dtype=dtype).transpose(1, 2)
        self.k = torch.randn(batch, heads_k, seq_k, dim + 3, dtype=dtype)[..., 2 : dim + 2]
        self.v = torch.randn(batch, heads_k, seq_k, dim_v, dtype=dtype)
        self.mask = make_mask(mask_kind, (batch, heads_q, seq_q, seq_k), dtype)
        self.has_float = self.mask is not None and self.mask.dtype != torch.bool
        inputs = (self.q, self.k, self.v, self.mask if self.has_float else None)
        self.tangents = [
            torch.randn_like(x) if name in tangents and x is not None else None
            for name, x in zip("qkvm", inputs, strict=True)
        ]
        if self.tangents[3] is not None:
            self.tangents[3][self.mask == -math.inf] = math.nan  # hidden: it must not matter
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        self.grad_out = torch.randn(batch, seq_q, heads_q, dim_v, dtype=dtype).transpose(1, 2)
        self.grad_lse = torch.randn(batch, heads_q, seq_q, dtype=accumulator)
        options = {"scale": dim**-0.5, "is_causal": False, "dropout_p": 0.0} | options
        if options.get("alibi_slopes"):
            options["alibi_slopes"] = torch.rand(heads_q) / 4
        # The halves of the batch have seeds of their own.
        seeds = torch.tensor([2**40 + 17, 5])[: batch % 2 + 1 if batch == 1 else 2]
        self.seed = seeds[:batch] if options["dropout_p"] else None
        self.options = options | {"seed": self.seed}
        self.inputs = (self.q, self.k, self.v, self.mask)
        self.call = AttentionCall(*self.inputs, **self.options)
        self.call.forward()

    def jvp(self) -> tuple[Tensor, ...]:
        return self.call.jvp(self.tangents)

    def double_backward(self, needs=(True,) * 5) -> tuple[Tensor, ...]:
        needs = [*needs[:4], needs[4] and self.has_float]
        return self.call.double_backward(self.grad_out, self.grad_lse, self.tangents, needs)

    def expected(self) -> tuple[Tensor | None, ...]:
        def wide(x):
            return x if x is None or x.dtype == torch.bool else x.double()

        inputs, tangents = [wide(x) for x in self.inputs], [wide(x) for x in self.tangents]
        return (
            *reference.attention_jvp(*inputs, tangents, **self.options),
            *reference.attention_double_backward(
                wide(self.grad_out), wide(self.grad_lse), *inputs, tangents, **self.options
            ),
        )

    def check(self) -> None:
        expected = self.expected()
        # The sums are of seq terms, the intermediate results are rounded to the dtype or better.
        roundings = 16 + math.sqrt(max(self.q.shape[-2], self.k.shape[-2]))
        both = (*self.jvp(), *self.double_backward())
        for name, actual, oracle in zip(NAMES[:2] + NAMES, both, expected[:2] + expected,
                                        strict=True):  # fmt: skip
            if oracle is None:
                assert actual.shape == (0,)
                continue
            size = 1 + (oracle.abs().max().item() if oracle.numel() else 0.0)
            if name == "g_mask":  # a sum over what the mask is broadcast to, which may cancel
                size *= 1 + math.sqrt(self.grad_lse.numel() * self.k.shape[-2] / oracle.numel())
            bound = roundings * unit_roundoff(self.q.dtype) * size
            assert_close(name, actual.double(), oracle, bound)


@pytest.mark.parametrize("tangents", TANGENTS)
@pytest.mark.parametrize("mask_kind", ["none", "shared float, hidden"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_tangents(dtype, mask_kind, tangents):
    Case(dtype, SMALL, mask_kind, tangents).check()


@pytest.mark.parametrize("options", CHOSEN)
@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype, mask_kind, options):
    Case(dtype, SMALL, mask_kind, **OPTIONS[options]).check()


@pytest.mark.parametrize("options", ["plain", "causal", "everything, wide window"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype, shape, options):
    Case(dtype, shape, **OPTIONS[options]).check()


@pytest.mark.parametrize("mask_kind", ["shared bool, hidden", "full float, hidden"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_over_several_tiles(dtype, mask_kind):
    Case(dtype, (2, 2, 1, 150, 300, 20, 12), mask_kind, softcap=1.3).check()


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 3, 3, 4, 4), (1, 2, 2, 0, 3, 4, 4), (1, 2, 2, 3, 0, 4, 4)]
)
def test_sizes_of_zero(shape):
    Case(torch.float32, shape).check()


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_only_what_is_needed(dtype, which):
    case = Case(dtype, (1, 2, 1, 40, 230, 8, 4), "full float, hidden", dropout_p=0.2)
    needs = [n == which for n in range(5)]
    results, whole = case.double_backward(needs), case.double_backward()
    for result, one, need in zip(results, whole, (needs[0], *needs), strict=True):
        assert torch.equal(result, one) if need else result.shape == (0,)


@pytest.mark.parametrize("mask_kind", ["shared bool, hidden", "full float, hidden"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_and_empty_rows_never_matter(dtype, mask_kind):
    case = Case(dtype, SMALL, mask_kind)
    clean = (*case.jvp(), *case.double_backward())
    _, t_key, t_value, _ = case.tangents
    for x in (case.k, case.v, t_key, t_value):
        x[:, :, 1] = math.nan
    for x in (case.q, case.tangents[0], case.grad_out):
        x[:, :, 2] = math.inf
    assert all(map(torch.equal, clean, (*case.jvp(), *case.double_backward())))
    case.tangents[2][:, :, 3] = math.nan
    assert case.jvp()[0][:, :, 0].isnan().any()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_same_call_is_bitwise_equal(heads, threads):
    case = Case(torch.float32, (1, heads, heads, 300, 260, 16, 16), "shared float, hidden")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = [(*case.jvp(), *case.double_backward()) for _ in range(3)]
        assert all(all(map(torch.equal, results[0], again)) for again in results[1:])
        case.check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", ["plain", "everything, wide window"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_are_the_sequences_one_by_one(dtype, options):
    starts_q, starts_k = torch.tensor([0, 70, 70, 200]), torch.tensor([0, 30, 100, 333])
    case = Case(dtype, (1, 4, 2, 200, 333, 16, 8), **OPTIONS[options])
    slopes, seed = case.options.get("alibi_slopes"), None if case.seed is None else case.seed[:1]
    case.call.extras = ops.Extras(slopes, seed, starts_q, starts_k)
    case.call.forward()
    results = (*case.jvp(), *case.double_backward())
    for b, (i, j) in enumerate(zip(starts_q.tolist(), starts_q.tolist()[1:], strict=False)):
        m, n = starts_k[b : b + 2].tolist()
        part = Case(dtype, (1, 4, 2, max(1, j - i), n - m, 16, 8), **OPTIONS[options])
        if i == j:
            continue
        rows, keys = (
            (slice(None), slice(None), slice(i, j)),
            (slice(None), slice(None), slice(m, n)),
        )
        part.inputs = (case.q[rows], case.k[keys], case.v[keys], None)
        part.q, part.k, part.v, _ = part.inputs
        t_query, t_key, t_value, _ = case.tangents
        part.tangents = [t_query[rows], t_key[keys], t_value[keys], None]
        part.grad_out, part.grad_lse = case.grad_out[rows], case.grad_lse[rows]
        part.options |= {"alibi_slopes": slopes, "seed": seed, "first_batch": b}
        expected = part.expected()
        roundings = 16 + math.sqrt(n - m + j - i)
        for name, actual, oracle in zip(NAMES[:2] + NAMES, results, expected[:2] + expected,
                                        strict=True):  # fmt: skip
            if oracle is not None:
                actual = actual[keys if name in ("g_key", "g_value") else rows]
                size = 1 + oracle.abs().max().item()
                assert_close(name, actual.double(), oracle, roundings * unit_roundoff(dtype) * size)


@pytest.mark.parametrize(
    "argument, change",
    [
        ("t_query", lambda a: {"t_query": a["t_query"][:, :, :2]}),
        ("t_key", lambda a: {"t_key": a["t_key"].double()}),
        ("t_value", lambda a: {"t_value": a["t_value"][..., :1]}),
        ("t_mask", lambda a: {"t_mask": a["attn_mask"]}),
        ("out", lambda a: {"out": a["out"][:1]}),
        ("row_max", lambda a: {"row_max": a["row_max"].double()}),
        ("log_sum", lambda a: {"log_sum": a["log_sum"][..., :1]}),
        ("seed", lambda a: {"seed": torch.arange(3), "dropout_p": 0.5}),
    ],
)
def test_a_direct_call_with_bad_metadata_raises(argument, change):
    case = Case(torch.float32, SMALL, "shared bool, hidden")
    call = case.call
    tangents = dict(zip(("t_query", "t_key", "t_value", "t_mask"), case.tangents, strict=True))
    groups = (call.inputs, call.extras, call.results, call.options)
    good = tangents | {name: x for group in groups for name, x in group._asdict().items()}
    with pytest.raises(RuntimeError, match=f"attention_jvp: {argument}: expected"):
        torch.ops.fastattn.attention_jvp(**(good | change(good)))


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
def test_nothing_is_read_beyond_the_mask():
    """Odd numbers of keys, rows whose window begins after the last key, and a page that must not be
    touched."""
    program = f"""
import ctypes, itertools, mmap, sys, torch
sys.path.insert(0, {TESTS!r})
from attention_call import AttentionCall
page = mmap.PAGESIZE
pages = mmap.mmap(-1, 2 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), page, 0) == 0
rows, keys = 36, 33
mask = torch.frombuffer(pages, dtype=torch.uint8, count=rows * keys, offset=page - rows * keys)
mask = mask.fill_(1).view(torch.bool).view(1, 1, rows, keys)
windows = ((1, -1), (0, 2), (3, 0))
for dtype, window in itertools.product((torch.bfloat16, torch.float32), windows):
    print(dtype, window, flush=True)
    q, k = (torch.randn(1, 1, n, 8).to(dtype) for n in (rows, keys))
    call = AttentionCall(q, k, k, mask, scale=0.3, window_size=window)
    out, *_ = call.forward()
    call.backward(out)
    call.jvp((q, k, k, None))
    call.double_backward(out, None, (q, k, k, None))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout, run.stderr[-2000:], run.returncode)


# rows, in, out
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 9), (33, 784, 128), (130, 401, 65), (0, 3, 4)])
@pytest.mark.parametrize("tangents", ["xwb", "x", "w", "b", "xb"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_relu_jvp(dtype, tangents, shape):
    rows, width, n = shape
    x = torch.randn(rows, width + 1, dtype=dtype)[:, 1:]
    w = torch.randn(n, width, dtype=dtype) / math.sqrt(width)
    given = {"x": torch.randn_like(x), "w": torch.randn_like(w), "b": torch.randn(n, dtype=dtype)}
    given = [given[name] if name in tangents else None for name in "xwb"]
    out, mask = ops.linear_relu_forward(x, w, None)
    actual = ops.linear_relu_jvp(x, w, mask, *given)
    wide = [None if t is None else t.double() for t in given]
    oracle = reference.linear_relu_jvp(x.double(), w.double(), ~(out <= 0), *wide)
    size = 1 + (oracle.abs().max().item() if oracle.numel() else 0.0)
    bound = (4 + math.sqrt(width)) * unit_roundoff(dtype) * size
    assert_close("t_out", actual.double(), oracle, bound)
