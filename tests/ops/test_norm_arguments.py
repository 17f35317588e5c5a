"""The native dropout_add_norm ops, called directly with bad arguments."""

from __future__ import annotations

import math

import pytest
import torch

from fastattn import ops

pytestmark = pytest.mark.native

GOOD = {
    "input": torch.ones(6, 4),
    "residual": torch.ones(6, 4),
    "weight": torch.ones(4),
    "bias": torch.ones(4),
    "seed": torch.tensor([1, 2]),
    "dropout_p": 0.5,
    "eps": 1e-5,
    "rms": False,
}
GOOD_BACKWARD = {
    "grad_out": torch.ones(6, 4),
    "grad_sum": torch.ones(6, 4),
    "sum": torch.ones(6, 4),
    "weight": torch.ones(4),
    "mean": torch.ones(6),
    "rstd": torch.ones(6),
    "seed": torch.tensor([1, 2]),
    "dropout_p": 0.5,
    "rms": False,
    "needs": [True] * 4,
}
BAD = [
    ("input", torch.ones(6, 4, dtype=torch.int32)),
    ("input", torch.ones(())),
    ("residual", torch.ones(6, 5)),
    ("residual", torch.ones(6, 4).double()),
    ("weight", torch.ones(5)),
    ("weight", torch.ones(4).half()),
    ("bias", torch.ones(1, 4)),
    ("bias", torch.ones(4).double()),
    ("seed", None),
    ("seed", torch.tensor([1, 2, 3, 4])),
    ("seed", torch.tensor([], dtype=torch.int64)),
    ("seed", torch.tensor([1], dtype=torch.int32)),
    ("dropout_p", 1.0),
    ("dropout_p", -0.1),
    ("dropout_p", math.nan),
    ("eps", -1.0),
    ("eps", math.nan),
]
BAD_BACKWARD = [
    ("sum", torch.ones(6, 4, dtype=torch.int32)),
    ("grad_out", torch.ones(6, 3)),
    ("grad_out", torch.ones(6, 4).half()),
    ("grad_sum", torch.ones(6, 3)),
    ("weight", torch.ones(3)),
    ("mean", torch.ones(5)),
    ("mean", torch.ones(6).double()),
    ("rstd", torch.ones(5)),
    ("seed", torch.tensor([1, 2, 3, 4])),
    ("needs", [True] * 3),
    ("rms", True),  # which has no mean
]


@pytest.mark.parametrize("argument, value", BAD)
def test_a_bad_argument_of_the_forward(argument, value):
    with pytest.raises(RuntimeError, match=f"forward: {argument}: expected .*, got"):
        ops.dropout_add_norm_forward(**(GOOD | {argument: value}))


@pytest.mark.parametrize("argument, value", BAD_BACKWARD)
def test_a_bad_argument_of_the_backward(argument, value):
    named = "mean" if argument == "rms" else argument
    with pytest.raises(RuntimeError, match=f"backward: {named}: expected .*, got"):
        ops.dropout_add_norm_backward(**(GOOD_BACKWARD | {argument: value}))


def test_a_backward_needs_a_cotangent():
    with pytest.raises(RuntimeError, match="grad_out: expected .*, got None"):
        ops.dropout_add_norm_backward(**(GOOD_BACKWARD | {"grad_out": None, "grad_sum": None}))
