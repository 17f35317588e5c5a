"""Direct calls of the native attention ops with bad arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastattn import ops

pytestmark = pytest.mark.native

INDICES = torch.tensor([0, 5])
NO_EXTRAS = ops.Extras()._asdict()


def packed(starts_q: list[int], starts_k: list[int]) -> dict[str, Tensor]:
    return {"starts_q": torch.tensor(starts_q), "starts_k": torch.tensor(starts_k)}


BAD = [
    ("key", lambda a: a | {"key": torch.randn(1, 2, 5, 9)}),
    ("key", lambda a: a | {n: torch.randn(1, 3, 5, 8) for n in ("key", "value")}),
    ("key", lambda a: a | {"key": torch.randn(2, 5, 8)}),
    ("key", lambda a: a | {"key": a["key"].double()}),
    ("value", lambda a: a | {"value": torch.randn(1, 2, 6, 8)}),
    ("query", lambda a: a | {"query": torch.randn(5, 8)}),
    ("query", lambda a: a | {"query": torch.ones(1, 2, 5, 8, dtype=torch.int64)}),
    ("attn_mask", lambda a: a | {"attn_mask": torch.zeros(1, 2, 4, 5)}),
    ("attn_mask", lambda a: a | {"attn_mask": torch.zeros(5, 5)}),
    ("attn_mask", lambda a: a | {"attn_mask": torch.zeros(1, 1, 5, 5, dtype=torch.int32)}),
    ("seed", lambda a: a | {"dropout_p": 0.5}),
    ("seed", lambda a: a | {"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}),
    ("dropout_p", lambda a: a | {"dropout_p": 1.0}),
    ("scale", lambda a: a | {"scale": math.inf}),
    ("softcap", lambda a: a | {"softcap": -1.0}),
    ("window_size", lambda a: a | {"left": -2}),
    ("alibi_slopes", lambda a: a | {"slopes": torch.ones(3)}),
    ("alibi_slopes", lambda a: a | {"slopes": torch.ones(2, 2)}),
    ("alibi_slopes", lambda a: a | {"slopes": torch.ones(2).double()}),
    ("starts_k", lambda a: a | {"starts_q": torch.tensor([0, 5])}),
    ("starts_k", lambda a: a | {"starts_k": torch.tensor([0, 5])}),
    ("starts_q", lambda a: a | packed([0, 4], [0, 5])),
    ("starts_q", lambda a: a | packed([1, 5], [0, 5])),
    ("starts_k", lambda a: a | packed([0, 3, 5], [0, 6, 5])),
    ("starts_k", lambda a: a | packed([0, 5], [0, 3, 5])),
    ("starts_q", lambda a: a | {"starts_q": torch.tensor([0.0, 5.0]), "starts_k": INDICES}),
    ("attn_mask", lambda a: a | packed([0, 5], [0, 5]) | {"attn_mask": torch.zeros(1, 1, 5, 5)}),
]


@pytest.mark.parametrize("argument, change", BAD)
def test_a_direct_call_with_bad_metadata_raises(argument, change):
    good = dict(
        query=torch.randn(1, 2, 5, 8),
        key=torch.randn(1, 2, 5, 8),
        value=torch.randn(1, 2, 5, 8),
        attn_mask=None,
        **NO_EXTRAS,
        **ops.Options()._asdict(),
    )
    with pytest.raises(RuntimeError, match=f"{argument}: expected .*, got"):
        torch.ops.fastattn.attention_forward(**change(good))


@pytest.mark.parametrize(
    "argument, value",
    [
        ("grad_out", torch.zeros(1, 2, 5, 7)),
        ("out", torch.zeros(1, 2, 4, 8)),
        ("row_max", torch.zeros(1, 2, 4)),
        ("row_max", torch.zeros(1, 2, 5).double()),
        ("log_sum", torch.zeros(1, 2, 1)),
        ("log_sum", torch.zeros(1, 2, 5).double()),
        ("grad_lse", torch.zeros(1, 2, 6)),
        ("needs", [True, True, True, True]),
    ],
)
def test_a_direct_backward_call_with_bad_metadata_raises(argument, value):
    q = torch.randn(1, 2, 5, 8)
    good = dict(
        grad_out=q,
        grad_lse=None,
        query=q,
        key=q,
        value=q,
        attn_mask=None,
        out=q,
        row_max=torch.zeros(1, 2, 5),
        log_sum=torch.zeros(1, 2, 5),
        needs=[True, True, True, False],
        **NO_EXTRAS,
        **ops.Options()._asdict(),
    )
    named = "attn_mask" if argument == "needs" else argument
    with pytest.raises(RuntimeError, match=f"{named}: expected .*, got"):
        torch.ops.fastattn.attention_backward(**(good | {argument: value}))
