"""Inputs and comparisons for tests of kernels. Import it from tests only: nothing shipped needs
it."""

from fastattn.testing.compare import assert_accurate, assert_close, unit_roundoff
from fastattn.testing.inputs import MASKS, OPTIONS, make_mask

__all__ = ["MASKS", "OPTIONS", "assert_accurate", "assert_close", "make_mask", "unit_roundoff"]
