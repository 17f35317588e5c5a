"""Every attention op has its arguments in the order of ``fastattn._call``, in both namespaces."""

from __future__ import annotations

import pytest
import torch

from fastattn import ops
from fastattn.ops import schemas

COTANGENTS = ("grad_out", "grad_lse")
TANGENTS = tuple(f"t_{name}" for name in ops.Tangents._fields)
GROUPS = {
    "attention_forward": (ops.Inputs, ops.Extras, ops.Options),
    "attention_backward": (COTANGENTS, ops.Inputs, ops.Extras, ops.Results, ops.Options),
    "attention_jvp": (ops.Inputs, ops.Extras, TANGENTS, ops.Results, ops.Options),
    "attention_double_backward": (
        COTANGENTS, ops.Inputs, ops.Extras, TANGENTS, ops.Results, ops.Options,
    ),
}  # fmt: skip
NEEDS = {"attention_backward": ["needs"], "attention_double_backward": ["needs"]}


def schema(namespace: str, name: str) -> torch.FunctionSchema:
    return getattr(getattr(torch.ops, namespace), name).default._schema


@pytest.mark.parametrize("namespace", schemas.NAMESPACES)
@pytest.mark.parametrize("name", GROUPS)
def test_the_arguments_have_one_order(name, namespace):
    expected = [x for group in GROUPS[name] for x in getattr(group, "_fields", group)]
    expected = ["t_mask" if x == "t_attn_mask" else x for x in expected] + NEEDS.get(name, [])
    assert [x.name for x in schema(namespace, name).arguments] == expected


@pytest.mark.parametrize("name", schemas.SHARED)
def test_the_namespaces_have_one_schema(name):
    ours, tritons = (str(schema(namespace, name)) for namespace in schemas.NAMESPACES)
    assert ours.removeprefix("fastattn::") == tritons.removeprefix("fastattn_triton::")


def test_flat_arguments_are_split_by_the_groups():
    numbers = ops.Options(scale=0.5)
    inputs, options, *rest = ops.split([1, 2, 3, None, *numbers, "more"], ops.Inputs, ops.Options)
    assert inputs == ops.Inputs(1, 2, 3, None)
    assert options == numbers
    assert rest == ["more"]
