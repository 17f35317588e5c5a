"""Forward mode of the Triton linear+ReLU kernels, and of the way by cuBLAS, against torch's."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_triton_linear import DTYPES, SHAPES, inputs

from fastattn import ops, reference
from fastattn.ops.triton import config
from fastattn.testing import assert_close

pytestmark = pytest.mark.triton


@pytest.fixture(params=[True, False], ids=["fused", "cublas"])
def fused(request, monkeypatch):
    monkeypatch.setattr(config, "fused_product", lambda *_: request.param)


def jvp(*args):
    return torch.ops.fastattn_triton.linear_relu_jvp(*args)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_jvp(dtype, shape, fused, device):
    x, w, b = inputs(*shape, dtype, device)
    # Where the output is 0 to within rounding, the side of the kink is the kernel's choice.
    out, bits = ops.linear_relu_forward(x, w, b, "triton")
    tangents = [torch.randn(t.shape, dtype=dtype, device=device) for t in (x, w, b)]
    tangents[0] = tangents[0].t().contiguous().t()  # any strides
    wide = [t.double() for t in (x, w, b)]
    _, expected = torch.func.jvp(
        torch.nn.functional.linear, tuple(wide), tuple(t.double() for t in tangents)
    )
    expected = torch.where(out > 0, expected, 0.0)
    t_out = jvp(x, w, bits, *tangents)
    assert t_out.dtype == dtype
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    size = tangents[0].double().abs() @ wide[1].abs().T + 4
    size = size + wide[0].abs() @ tangents[1].double().abs().T
    unit = 2 * torch.finfo(dtype).eps + 2 * shape[1] * torch.finfo(accumulator).eps
    assert_close("t_out", t_out, expected, unit * size)


@pytest.mark.parametrize("present", [*itertools.product([True, False], repeat=3)][:-1], ids=str)
def test_absent_tangents(present, fused, device):
    x, w, b = (t.double() for t in inputs(3 * 7, 5, 9, torch.float32, device))
    x = x.view(3, 7, 5)
    _, bits = ops.linear_relu_forward(x, w, b, "triton")
    full = [torch.randn_like(t) for t in (x, w, b)]
    zeros = [t if here else torch.zeros_like(t) for t, here in zip(full, present, strict=True)]
    _, expected = torch.func.jvp(reference.linear_relu, (x, w, b), tuple(zeros))
    given = [t if here else None for t, here in zip(full, present, strict=True)]
    torch.testing.assert_close(jvp(x, w, bits, *given), expected)


def test_no_rows_no_columns_and_a_nan(fused, device):
    x, w, b = inputs(20, 5, 9, torch.float32, device)
    _, bits = ops.linear_relu_forward(x, w, b, "triton")
    assert jvp(x[:0], w, bits[:0], x[:0], w, None).shape == (0, 9)
    assert not jvp(x[:, :0], w[:, :0], bits, x[:, :0], w[:, :0], None).any()
    t_x = x.clone()
    t_x[3, 2] = float("nan")
    out = jvp(x, w, bits, t_x, None, None)
    passes = reference.linear_relu_forward(x, w, b)[1]
    assert torch.equal(out.isnan()[3], passes[3])
    assert not out[4:].isnan().any()


@pytest.mark.parametrize(
    "argument, change",
    [
        ("weight", {"weight": torch.zeros(3, 4)}),
        ("mask", {"mask": torch.zeros(2, 2, dtype=torch.uint8)}),
        ("t_weight", {"t_weight": torch.zeros(3, 4)}),
        ("t_bias", {"t_bias": torch.zeros(3).double()}),
        ("t_input", {"t_input": None}),
    ],
)
def test_a_direct_call_with_bad_metadata_raises(argument, change, device):
    good = {"input": torch.randn(2, 5), "weight": torch.randn(3, 5)}
    good |= {"mask": torch.zeros(2, 1, dtype=torch.uint8), "t_input": torch.randn(2, 5)}
    good |= {"t_weight": None, "t_bias": None}
    call = {n: x if x is None else x.to(device) for n, x in (good | change).items()}
    with pytest.raises(RuntimeError, match=f"{argument}: expected .*, got"):
        jvp(*call.values())


def test_fake(device):
    x, w, b = inputs(6, 5, 9, torch.float32, device)
    _, bits = ops.linear_relu_forward(x, w, b, "triton")
    torch.library.opcheck(
        torch.ops.fastattn_triton.linear_relu_jvp, (x, w, bits, x, None, b),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
