"""Which combinations of options a test takes."""

from __future__ import annotations

import itertools
import os


def every_pair(*axes) -> list[tuple]:
    """Combinations of the axes' values such that any two values of different axes meet in one:
    compilations and interpreted kernels take seconds. FASTATTN_TEST_EVERY=1 gives all combinations;
    run it after a change to the kernels."""
    combinations = list(itertools.product(*axes))
    if os.environ.get("FASTATTN_TEST_EVERY") == "1":
        return combinations

    def pairs(values: tuple) -> set:
        return set(itertools.combinations(enumerate(values), 2))

    wanted, chosen = set().union(*map(pairs, combinations)), []
    while wanted:
        chosen.append(max(combinations, key=lambda values: len(pairs(values) & wanted)))
        wanted -= pairs(chosen[-1])
    return chosen
