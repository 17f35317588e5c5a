"""Scores of any size: the largest decides, an overflow is a NaN, and neither depends on threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference

pytestmark = pytest.mark.native

LARGEST = {torch.float32: 37, torch.float64: 300, torch.bfloat16: 37, torch.float16: 4}
# Exponents in base 2 and in base e, few queries and blocks of them.
TERMS = ("none", "bool mask", "float mask", "alibi", "negative scale")
QUERIES = (2, 40)


def terms_of(name: str, rows: int, keys: int, dtype: torch.dtype) -> dict[str, object]:
    if name == "bool mask":
        return {"attn_mask": torch.rand(rows, keys) > 0.3}
    if name == "float mask":
        return {"attn_mask": torch.randn(rows, keys, dtype=dtype)}
    if name == "alibi":
        return {"alibi_slopes": torch.tensor([0.5, 0.25])}
    return {"scale": -0.3} if name == "negative scale" else {}


@pytest.mark.parametrize("dtype", LARGEST, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("rows", QUERIES)
def test_the_largest_score_decides_however_large(dtype, terms, rows):
    q, k, v = (torch.randn(1, 2, n, 16, dtype=dtype) for n in (rows, 333, 333))
    options = terms_of(terms, rows, 333, dtype)
    for exponent in range(1, LARGEST[dtype] + 1, 1 if LARGEST[dtype] < 100 else 23):
        large = (q.double() * 10.0**exponent).to(dtype)
        # Scores in the kernels' accumulator, 16-bit inputs' in float32; their order is float64's.
        expected = reference.attention(
            *(x.double() for x in (large, k, v)),
            **{n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
               for n, x in {"scale": 0.25, **options}.items()},
        )[0]  # fmt: skip
        out = fastattn.scaled_dot_product_attention(large, k, v, backend="cpu", **options)
        # From 10^3 on nearly every row is one value; ties to rounding leave mixtures of two.
        apart = ((out - expected).abs() > 0.02 * expected.abs().amax()).any(-1)
        assert out.isfinite().all(), exponent
        assert apart.double().mean() <= (0.03 if exponent > 2 else 0.0), exponent


@pytest.mark.parametrize("rows", QUERIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("hidden", ["nothing", "by a bool mask", "by a float mask", "by a window"])
def test_scores_of_minus_infinity_alone_are_nan(rows, dtype, hidden):
    """Products that overflowed, as torch's softmax has it; a masked key is no such score."""
    q, k, v = (torch.randn(1, 1, n, 8, dtype=dtype) for n in (rows, 70, 70))
    q[..., 0, :], k[..., 0, :] = 3e30, -3e30  # query 0 and key 0: minus infinity
    mask = torch.zeros(rows, 70, dtype=torch.bool)
    mask[0, 0] = mask[1:] = True  # query 0 sees key 0 alone
    options: dict[str, object] = {"attn_mask": mask}
    if hidden == "by a float mask":
        options = {"attn_mask": torch.zeros(rows, 70, dtype=dtype).masked_fill(~mask, -torch.inf)}
    elif hidden == "by a window":
        options = {"window_size": (0, 0)}
    elif hidden == "nothing":
        k[..., 1:, :], options = k[..., :1, :], {}
    out, lse = fastattn.scaled_dot_product_attention(
        q, k, v, return_lse=True, backend="cpu", **options
    )
    assert out[..., 0, :].isnan().all()
    assert lse[..., 0].isnan().all()
    assert out[..., 1:, :].isfinite().all()
    assert torch.softmax(q[0, 0, :1].float() @ k[0, 0, :1].float().T, -1).isnan().all()


@pytest.mark.parametrize("rows", QUERIES)
def test_minus_infinity_beside_finite_scores_is_no_weight(rows):
    q, k, v = (torch.randn(1, 1, n, 8) for n in (rows, 70, 70))
    q[..., 0, :], k[..., 0, :] = 3e30, -3e30
    out = fastattn.scaled_dot_product_attention(q, k, v, backend="cpu")
    expected = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1) @ v
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("rows", QUERIES)
def test_a_row_whose_keys_are_all_masked_is_0(rows):
    q, k, v = (torch.randn(1, 1, n, 8) for n in (rows, 70, 70))
    mask = torch.ones(rows, 70, dtype=torch.bool)
    mask[1] = False
    out, lse = fastattn.scaled_dot_product_attention(q, k, v, mask, return_lse=True, backend="cpu")
    assert not out[..., 1, :].any()
    assert (lse[..., 1] == -torch.inf).all()
    assert out[..., 0, :].all()


@pytest.mark.parametrize(
    "heads, rows, keys",
    [(1, 1, 5000), (2, 3, 700), (8, 2, 2000), (40, 1, 1000), (1, 60, 900)],
)
def test_the_same_bits_on_any_number_of_threads(heads, rows, keys):
    q, k, v = (torch.randn(1, heads, n, 64) for n in (rows, keys, keys))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(fastattn.scaled_dot_product_attention(q, k, v, return_lse=True))
    finally:
        torch.set_num_threads(before)
    for again in found[1:]:
        assert all(map(torch.equal, found[0], again))


MEMORY = """
import resource, torch, fastattn
torch.set_num_threads(2)
def used(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def call(batch):
    q, k, v = (torch.zeros(batch, 1, n, 64) for n in (1, 2, 2))
    fastattn.scaled_dot_product_attention(q, k, v)
    return 4 * 64 * batch * 6 // 1024
call(10)
before = used()
inputs = call(150_000)
print(used() - before - inputs)
"""


def test_scratch_does_not_grow_with_the_batch():
    kilobytes = int(subprocess.check_output([sys.executable, "-c", MEMORY], text=True))
    assert kilobytes < 20_000
