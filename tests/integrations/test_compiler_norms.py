"""Norms with the sum and the dropout before them through torch.compile(backend="fastattn")."""

from __future__ import annotations

from collections import Counter

import compiled
import pytest
import torch
import torch.nn.functional as F
from compiled import (  # noqa: F401
    assert_same,
    fused,
    kernel_calls,
    no_graph_of_another_test,
    torchs_draws,
    unsupported,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.functional import _served

pytestmark = compiled.MARKS
ROWS, WIDTH = 6, 20


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-3)
        self.rms = nn.RMSNorm(WIDTH, eps=1e-3)
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, WIDTH))


def written(x: Tensor, weight: Tensor | None, eps: float = 1e-3) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + eps)
    return x.to(dtype) if weight is None else weight * x.to(dtype)


def drop(x: Tensor) -> Tensor:
    return F.dropout(x, 0.4)


def _twice(m, x):  # a pre-norm block: both sums are read again
    x = x + drop(m.a(x))
    x = x + drop(m.b(m.norm(x)))
    return m.norm(x) + x


def _in_place(m, x):
    hidden = drop(m.a(x))
    hidden += x
    return m.norm(hidden)


DROPPED = {
    "behind": lambda m, x: m.norm(drop(m.a(x)) + x),
    "before": lambda m, x: m.norm(x + drop(m.a(x))),
    "of two": lambda m, x: m.norm(torch.add(m.b(x), drop(m.a(x)))),
    "read again": lambda m, x: m.norm(s := x + drop(m.a(x))) * s,
    "twice": _twice,
    "in place": _in_place,
    "torch's rms_norm": lambda m, x: m.rms(x + drop(m.a(x))),
    "rms written": lambda m, x: written(x + drop(m.a(x)), m.scale),
}


@pytest.mark.parametrize("case", DROPPED)
def test_dropout_sum_and_norm_are_one_call(case, torchs_draws):  # noqa: F811
    model = Model()
    call = lambda x: DROPPED[case](model, x)  # noqa: E731
    assert_same(call, torch.randn(2, ROWS, WIDTH), parameters=list(model.parameters()))
    assert fused() == ["dropout_add_norm"] * (2 if case == "twice" else 1)


def _sum_read_before(m, x):
    s = x + drop(m.a(x))
    t = s.sin()
    return m.norm(s) + t


def _changed_before(m, x):
    with torch.no_grad():
        s = x.cos()
        hidden = drop(s)
        s.add_(1.0)
        return m.norm(hidden + s)


def _dropped_twice_read(m, x):
    hidden = drop(x.cos())
    return m.norm(hidden + x) + hidden


def _dropped_in_place(m, x):
    return m.norm(F.dropout(x.cos(), 0.4, inplace=True) + x)


@pytest.mark.parametrize(
    ("call", "left"),
    [
        (_sum_read_before, ["activation_dropout"]),
        (_changed_before, ["activation_dropout"]),
        (_dropped_twice_read, ["activation_dropout"]),
        (_dropped_in_place, []),
        (lambda m, x: m.norm(m.a(x) + x), []),
        (lambda m, x: F.layer_norm(drop(x.cos()) + x, (ROWS, WIDTH)), ["activation_dropout"]),
    ],
    ids=["sum read before", "changed before", "read twice", "in place", "no dropout", "two dims"],
)
def test_what_is_not_one_call(call, left, torchs_draws):  # noqa: F811
    model = Model()
    assert_same(lambda x: call(model, x), torch.randn(2, ROWS, WIDTH))
    assert fused() == left


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_residual_that_broadcasts_is_torchs(dynamic, torchs_draws, kernel_calls):  # noqa: F811
    model, x = Model(), torch.randn(2, ROWS, WIDTH)
    call = lambda x: model.norm(drop(model.a(x)) + x[:1])  # noqa: E731
    ours = torch.compile(call, backend="fastattn", dynamic=dynamic)
    torch.manual_seed(1)
    actual = ours(x)
    torch.manual_seed(1)
    torch.testing.assert_close(actual, call(x))
    assert ("dropout_add_norm" in fused()) == dynamic  # the call looks at the shapes
    assert "dropout_add_norm" not in kernel_calls


def test_without_gradients_a_sum_and_a_norm_are_one_call(kernel_calls):  # noqa: F811
    model, x = Model(), torch.randn(2, ROWS, WIDTH)

    def call(x: Tensor) -> Tensor:
        s = model.a(x) + x
        return model.norm(s) + s.sin()

    with torch.no_grad():
        actual = torch.compile(call, backend="fastattn")(x)
        torch.testing.assert_close(actual, call(x))
    assert fused() == kernel_calls == ["dropout_add_norm"]


WRITTEN = {
    "with a weight": lambda m, x: written(x.sin(), m.scale),
    "without": lambda m, x: written(x.sin(), None),
    "as in Gemma": lambda m, x: written(x.sin(), None) * (1.0 + m.scale),
    "weight last": lambda m, x: (
        x.mul(torch.rsqrt(1e-3 + torch.mean(x * x, dim=-1, keepdim=True))) * m.scale
    ),
    "a sum before": lambda m, x: written(x + m.a(x), m.scale),
    "a sum that is read": lambda m, x: written(s := x + m.a(x), m.scale) + s,
    "torch's function": lambda m, x: m.rms(x.sin()),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_rms_norm_written_out(case, kernel_calls):  # noqa: F811
    model = Model()
    call = lambda x: WRITTEN[case](model, x)  # noqa: E731
    assert_same(call, torch.randn(2, ROWS, WIDTH), parameters=list(model.parameters()))
    assert fused() == kernel_calls == ["dropout_add_norm"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_16_bits_keeps_its_roundings(dtype, kernel_calls):  # noqa: F811
    """What is computed in float32 is one call; the weight comes after the rounding."""
    weight, x = torch.randn(WIDTH, dtype=dtype), torch.randn(50, ROWS, WIDTH, dtype=dtype)
    actual = torch.compile(lambda x: written(x, weight), backend="fastattn")(x)
    expected = written(x, weight)
    assert (actual == expected).float().mean() > 0.99  # a sum's order moves single roundings
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=0.0)
    assert kernel_calls == ["dropout_add_norm"]


def _root_read(m, x):
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
    return x * root + root


@pytest.mark.parametrize(
    "call",
    [
        _root_read,
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1) + 1e-3).unsqueeze(-1),
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3),
        lambda m, x: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-3),
        lambda m, x: x.sin() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
    ],
)
def test_what_is_no_rms_norm(call):
    assert_same(lambda x: call(None, x), torch.randn(2, ROWS, WIDTH))
    assert not fused()


def block(m: Model, x: Tensor) -> Tensor:
    x = x + drop(m.a(written(x, m.scale)))
    return m.norm(drop(F.gelu(m.b(x))) + x)


def test_second_derivatives():
    model = Model().double()

    def call(x: Tensor) -> Tensor:
        x = written_in_its_dtype(x + model.a(x), model.scale.double())
        return F.gelu(model.b(F.silu(model.a(x)) * model.b(x)))

    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    compiled_call = torch.compile(call, backend="fastattn")
    torch.autograd.gradcheck(compiled_call, x)
    torch.autograd.gradgradcheck(compiled_call, x)
    assert sorted(fused()) == ["dropout_add_norm", "gated_mlp", "linear"]


def written_in_its_dtype(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside, torchs_draws):  # noqa: F811
    model, x = Model(), torch.randn(2, ROWS, WIDTH)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(model, x)

    call = torch.compile(cast if inside else lambda x: block(model, x), backend="fastattn")
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        actual = call(x)
    torch.manual_seed(1)
    expected = cast(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_drops_the_same_elements_again(reentrant):
    model, x = Model(), torch.randn(2, ROWS, WIDTH, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return checkpoint(lambda x: drop(F.gelu(model.a(x))), x, use_reentrant=reentrant)

    out = torch.compile(call, backend="fastattn")(x)
    assert fused() == ["linear"]
    out.sum().backward()
    z = model.a(x)
    kept = (out != 0) / 0.6
    expected = torch.autograd.grad((F.gelu(z) * kept).sum(), model.a.bias)[0]
    torch.testing.assert_close(model.a.bias.grad, expected)


def test_all_lengths_have_two_graphs(torchs_draws):  # noqa: F811
    model = Model()
    call = torch.compile(lambda x: block(model, x), backend="fastattn")
    for rows in (5, 7, 11):
        x = torch.randn(2, rows, WIDTH)
        torch.manual_seed(1)
        actual = call(x)
        torch.manual_seed(1)
        torch.testing.assert_close(actual, block(model, x), rtol=1e-4, atol=1e-5)
    assert fastattn.compile_report().graphs == 2


def test_small_problems_of_any_length_are_torchs(monkeypatch, kernel_calls):  # noqa: F811
    """Sizes that are known at the call alone: the call decides, and torch's draws stay."""
    least = 1 << 40
    for name in ("LEAST_WORK", "LEAST_NORM", "LEAST_RMS_NORM", "LEAST_DROPOUT"):
        monkeypatch.setattr(_served, name, least)
    model, x = Model(), torch.randn(2, ROWS, WIDTH)

    def whole(x: Tensor) -> Tensor:
        x = block(model, drop(x))
        return F.silu(model.a(x)) * model.b(x)

    call = torch.compile(whole, backend="fastattn", dynamic=True)
    torch.manual_seed(1)
    actual = call(x)
    torch.manual_seed(1)
    torch.testing.assert_close(actual, whole(x), rtol=1e-6, atol=1e-6)
    assert Counter(fused()) == {
        "activation_dropout": 1, "linear": 2, "gated_mlp": 1, "dropout_add_norm": 2,
    }  # fmt: skip
    assert not kernel_calls
    monkeypatch.setattr(_served, "LEAST_DROPOUT", 2 * ROWS * WIDTH + 1)
    call(x)
    assert not kernel_calls
    call(torch.randn(2, ROWS + 1, WIDTH))
    assert set(kernel_calls) == {"activation_dropout"}
