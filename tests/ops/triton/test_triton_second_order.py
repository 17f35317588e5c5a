"""Forward mode and double backward of the Triton attention kernels against derivatives of the
oracle: every option, over small odd shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from second_order import ALL, NAMES, Case
from test_triton_attention import DTYPES, MASKS, OPTIONS, SHAPES, bound, check

from fastattn.ops.triton import config

pytestmark = pytest.mark.triton


def check_case(case: Case, present=ALL, needs=(True,) * 5, lse_gradient=True) -> None:
    """The double backward, whose first two results are the jvp's."""
    out, lse = case.op("attention_forward")
    tangents = case.tangents(present)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse) if lse_gradient else None
    needs = [*needs[:4], needs[4] and case.differentiable[3]]
    t_out, t_lse, *grads = case.op(
        "attention_double_backward",
        grad_out,
        grad_lse,
        between=(*tangents, out, lse),
        after=(needs,),
    )
    if needs[0]:
        expected_out, expected_lse = case.expected_jvp(tangents)
        assert t_out.dtype == case.dtype
        assert t_lse.dtype == lse.dtype
        size = expected_out.abs().max().cpu() + 1
        check("t_out", t_out, expected_out, bound(case.dtype, size, 8))
        size = expected_lse.abs().max().cpu() + 1
        check("t_lse", t_lse, expected_lse, bound(t_lse.dtype, size, 8))
    if not any(needs[1:]):
        return
    expected = case.expected_double(grad_out, grad_lse, tangents)
    for name, needed, grad, wanted in zip(NAMES, needs[1:], grads, expected, strict=True):
        if not needed:
            assert grad.shape == (0,), name
            continue
        assert grad.dtype == case.dtype
        check(name, grad, wanted, bound(case.dtype, wanted.abs().max().cpu() + 1, 8))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, shape, device):
    check_case(Case(shape, options, "none", torch.float32, device))


@pytest.mark.parametrize("options", ["plain", "left window, causal", "everything"])
@pytest.mark.parametrize("mask", MASKS[1:])
def test_masks(mask, options, device):
    check_case(Case(SHAPES["grouped, long"], OPTIONS[options], mask, torch.float64, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_dtypes(options, mask, dtype, device):
    check_case(Case((2, 2, 1, 17, 33, 24, 8), OPTIONS[options], mask, dtype, device))


@pytest.mark.parametrize("present", [*itertools.product([True, False], repeat=4)][1:-1], ids=str)
def test_absent_tangents(present, device):
    options = {"softcap": 0.8, "dropout_p": 0.2, "is_causal": True}
    check_case(Case((1, 2, 1, 17, 18, 5, 7), options, "key bias", torch.float64, device), present)


@pytest.mark.parametrize("one", range(5))
def test_needs(one, device):
    case = Case((1, 2, 2, 17, 18, 5, 7), {}, "float", torch.float64, device)
    check_case(case, needs=[n == one for n in range(5)], lse_gradient=one % 2 == 0)


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_a_seed_for_each_share_of_the_batch(seeds, device):
    case = Case(
        (4, 2, 1, 5, 18, 4, 4), {"dropout_p": 0.4}, "key bias", torch.float64, device, seeds
    )
    out, lse = case.op("attention_forward")
    expected = case.oracle(*case.wide())
    torch.testing.assert_close((out, lse), expected)
    check_case(case)


@pytest.mark.parametrize("mask", ["none", "float"])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_tensor_descriptors(options, mask, device, monkeypatch):
    monkeypatch.setattr(config, "INTERPRETED", config.INTERPRETED._replace(tma=True))
    case = Case(SHAPES["square"], OPTIONS[options], mask, torch.float32, device)
    case.inputs[0] = case.inputs[0].contiguous()
    check_case(case)
