"""Comparisons for tests of kernels. Import it from tests only: nothing shipped needs it."""

from fastattn.testing.compare import assert_accurate, assert_close, unit_roundoff

__all__ = ["assert_accurate", "assert_close", "unit_roundoff"]
