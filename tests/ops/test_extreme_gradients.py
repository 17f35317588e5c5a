"""Derivatives at scores of any size: the rows of P that the kernels make again sum to 1, as those
of the forward pass did."""

from __future__ import annotations

import math

import pytest
import torch
from test_extreme_scores import QUERIES, TERMS, terms_of
from torch import Tensor

import fastattn
from fastattn.testing import assert_close, unit_roundoff

pytestmark = pytest.mark.native

NAMES = ("out", "dq", "dk", "dv", "dmask")
KEYS = 333
SCALE = 0.25  # a power of 2, of products of 16 terms


def exact_inputs(dtype: torch.dtype, rows: int) -> list[Tensor]:
    """Query, key, value and cotangent. Quarters: no score is rounded, at any power of 2."""
    q, k, v, cotangent = (torch.randn(2, 2, n, 16) for n in (rows, KEYS, KEYS, rows))
    q, k = ((4 * x).round() / 4 for x in (q, k))
    return [x.to(dtype) for x in (q, k, v, cotangent)]


def check(function, leaves: list[Tensor], cotangent: Tensor, p: Tensor, where: str = "") -> None:
    """The output and all gradients beside those of the rows of P, in float64."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    found = (out.detach(), *torch.autograd.grad(out, leaves, cotangent))
    q, k, v, go = (x.detach().double() for x in (*leaves[:3], cotangent))
    dp = go @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    expected = (p @ v, SCALE * ds @ k, SCALE * ds.mT @ q, p.mT @ go, ds.sum(1, keepdim=True))
    # P's exponent, of about log KEYS, is rounded three times; a few are of dP, dO . O and the sums.
    roundings = 4 + 3 * math.log(KEYS)
    size = p * (2 * go.abs() @ v.abs().mT).amax(-1, keepdim=True)
    sizes = (v, SCALE * size @ k.abs(), SCALE * size.mT @ q.abs(), p.mT @ go.abs(), size.sum(1))
    for name, actual, wanted, largest in zip(NAMES, found, expected, sizes, strict=False):
        bound = roundings * unit_roundoff(out.dtype) * largest.abs().max()
        assert_close(f"{name} {where}", actual, wanted, bound)


LOWEST = [
    (torch.float32, None), (torch.float32, -1e9), (torch.bfloat16, None), (torch.bfloat16, -1e9),
    (torch.float16, None),
]  # fmt: skip


@pytest.mark.parametrize("rows", QUERIES)
@pytest.mark.parametrize("kind", ["left padding", "whole rows", "whole rows of keys in sight"])
@pytest.mark.parametrize("dtype, lowest", LOWEST, ids=str)
def test_rows_of_a_finite_lowest_number_alone(dtype, lowest, kind, rows):
    """Beside it the scores are lost to rounding, and the logarithm of their sum must not be."""
    *leaves, cotangent = exact_inputs(dtype, rows)
    lowest = torch.finfo(dtype).min if lowest is None else lowest
    i, j = torch.arange(rows)[:, None], torch.arange(KEYS)
    mask, hidden = torch.zeros(2, 1, rows, KEYS, dtype=dtype), torch.zeros(rows, KEYS).bool()
    if kind == "left padding":  # the first rows see padded keys alone
        mask[0, ..., : rows // 2 + 20] = mask[1, ..., :1] = lowest
        hidden = j > i + 20
    else:
        mask[0, :, ::3] = mask[1, ..., 300:] = lowest
        hidden = j < 40 if kind == "whole rows of keys in sight" else hidden
    q, k = (x.double() for x in leaves[:2])
    scores = (SCALE * q @ k.mT + mask.double()).float()  # as the kernels have them
    p = scores.double().masked_fill(hidden, -torch.inf).softmax(-1)

    def attend(q, k, v, bias):
        bias = bias.masked_fill(hidden, -torch.inf)
        return fastattn.scaled_dot_product_attention(q, k, v, bias, scale=SCALE)

    check(attend, [*leaves, mask], cotangent, p)


# Exponents of 2 in front of queries of about 1.
LARGEST = {torch.float32: 118, torch.float64: 1000, torch.bfloat16: 118, torch.float16: 12}


@pytest.mark.parametrize("rows", QUERIES)
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_gradients_of_scores_however_large(dtype, rows):
    q, k, v, cotangent = exact_inputs(dtype, rows)
    for exponent in torch.linspace(0, LARGEST[dtype], 13).int():
        large = torch.ldexp(q, exponent)
        p = (SCALE * large.double() @ k.double().mT).softmax(-1)

        def attend(q, k, v):
            return fastattn.scaled_dot_product_attention(q, k, v, scale=SCALE)

        check(attend, [large, k, v], cotangent, p, f"at 2^{exponent}")


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("magnitude", [300, 3000])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_rows_of_p_sum_to_1(rows, magnitude, terms):
    """However the sums of a score are rounded; those of one query are added in another order."""
    q, k, v, cotangent = (torch.randn(3, 2, n, 24) for n in (rows, KEYS, KEYS, rows))
    options = terms_of(terms, rows, KEYS, torch.float32)
    v.requires_grad_()
    out = fastattn.scaled_dot_product_attention(magnitude * q, k, v, **options)
    (dv,) = torch.autograd.grad(out, v, cotangent)
    torch.testing.assert_close(dv.sum(-2), cotangent.sum(-2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("magnitude", [300, 3000])
@pytest.mark.parametrize("lengths", [(1, 3, 70, 2), (1, 1, 2, 1)], ids=str)
def test_rows_of_p_sum_to_1_in_packed_sequences(lengths, magnitude):
    tokens, keys = sum(lengths), 4 * KEYS
    q, k, v = (torch.randn(n, 2, 24) for n in (tokens, keys, keys))
    cotangent = torch.randn(tokens, 2, 24)
    starts, starts_k = (torch.tensor([0, *n]).cumsum(0) for n in (lengths, [KEYS] * 4))
    v.requires_grad_()
    out = fastattn.varlen_attn(magnitude * q, k, v, starts, starts_k, max(lengths), KEYS)
    (dv,) = torch.autograd.grad(out, v, cotangent)
    expected = [x.sum(0) for x in cotangent.split(lengths)]
    sums = [x.sum(0) for x in dv.split(KEYS)]
    torch.testing.assert_close(sums, expected, atol=1e-5, rtol=1e-5)
