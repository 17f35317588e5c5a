"""The comparison that tests of kernels use can fail, and their masks hide what their names say."""

from __future__ import annotations

import math

import pytest
import torch

from fastattn.testing import MASKS, assert_accurate, assert_close, make_mask

X = (1.0, 2.0)


@pytest.mark.parametrize("wrong", [2.1, math.nan, math.inf])
def test_the_comparison_names_the_worst_coordinate(wrong):
    x = torch.tensor(X)
    assert_close("x", x, x.double(), 0.0)
    with pytest.raises(AssertionError, match=r"x: 1 of 2 .*worst at \(1,\): expected 2, got "):
        assert_close("x", torch.tensor([1.0, wrong]), x.double(), 1e-3)


def test_the_comparison_tells_the_error_and_what_is_allowed():
    x = torch.tensor(X, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"got 2\.5, error 0\.5, allowed 0\.001"):
        assert_close("x", torch.tensor([1.0, 2.5]), x, torch.tensor([1e-2, 1e-3]))


def test_a_nan_on_both_sides_and_another_shape_fail():
    x = torch.tensor(X, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"worst at \(0,\)"):
        assert_close("x", x * torch.nan, x * torch.nan, math.inf)
    with pytest.raises(AssertionError, match="expected shape"):
        assert_close("x", x[:1], x, 1.0)
    assert_close("x", x / 0.0, x / 0.0, 0.0)


def test_a_result_that_is_worse_than_the_peers_fails():
    x = torch.tensor(X)
    with pytest.raises(AssertionError, match="worst at"):
        assert_accurate("x", x + 1e-3, x.double(), x + 1e-4)


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind):
    mask = make_mask(kind, (2, 4, 15, 20), torch.float64)
    if kind == "none":
        assert mask is None
        return
    assert torch.broadcast_shapes(mask.shape, (2, 4, 15, 20)) == (2, 4, 15, 20)
    hidden = (~mask if mask.dtype == torch.bool else mask == -math.inf).expand(2, 4, 15, 20)
    if kind.endswith(", hidden"):
        if mask.shape[-2] > 1:
            assert hidden[:, :, 2].all()
        if mask.shape[-1] > 1:
            assert hidden[..., 1].all()
    assert not hidden.all()
