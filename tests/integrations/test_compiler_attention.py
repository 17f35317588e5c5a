"""softmax(QKᵀ/√d)V as models write it out, through torch.compile(backend="fastattn")."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.integrations.graph.nodes import is_pure

pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("error::fastattn.FastAttnWarning")]
HIDDEN = torch.arange(9) > torch.arange(6)[:, None] + 3  # of 9 keys, from each of 6 queries
ROW_HIDDEN = HIDDEN | (torch.arange(6) == 2)[:, None]  # query 2 sees none
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def _no_graph_of_another_test():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def kernel_calls(monkeypatch) -> list[dict]:
    """The options of the calls that the kernels took."""
    calls = []
    kernel = fastattn.functional.scaled_dot_product_attention

    def counted(*args, **options):
        calls.append(options)
        return kernel(*args, **options)

    monkeypatch.setattr(fastattn.functional, "scaled_dot_product_attention", counted)
    return calls


def qkv(*batch: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(
        torch.randn(*batch, rows, width, requires_grad=True)
        for rows, width in ((6, 8), (9, 8), (9, 5))
    )


def compare(call: Callable[..., Tensor], *inputs: Tensor) -> None:
    actual, expected = torch.compile(call, backend="fastattn")(*inputs), call(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    weights = torch.randn_like(expected)
    found = [torch.autograd.grad((out.nan_to_num() * weights).sum(), inputs)
             for out in (actual, expected)]  # fmt: skip
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5, equal_nan=True)


def _masked(fill: float, hidden: Tensor) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        return torch.matmul(F.softmax(scores.masked_fill(hidden, fill), dim=-1), v)

    return call


def _added(mask: Tensor) -> Callable[..., Tensor]:
    return lambda q, k, v: torch.softmax(mask + q @ k.mT * 0.3, -1) @ v


WRITTEN = {
    "plain": lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1), -1) @ v,
    "scaled": lambda q, k, v: (0.3 * (q @ k.transpose(2, 3))).softmax(3) @ v,
    "divided": lambda q, k, v: F.softmax(q.matmul(k.mT) / 2.0, dim=-1).matmul(v),
    "the query scaled": lambda q, k, v: F.softmax((q * 0.3) @ k.mT, -1) @ v,
    "permuted": lambda q, k, v: F.softmax(q @ k.permute(0, 1, 3, 2), -1) @ v,
    "a projection between": lambda q, k, v: (
        F.softmax(q @ k.mT, -1) @ F.linear(v, torch.eye(5)).transpose(1, 2).transpose(1, 2)
    ),
    "dropout off": lambda q, k, v: F.dropout(F.softmax(q @ k.mT, -1), 0.3, False) @ v,
    "softmax in float32": lambda q, k, v: (
        F.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype) @ v
    ),
    "minus infinity": _masked(-math.inf, HIDDEN),
    "-1e9": _masked(-1e9, HIDDEN),
    "the lowest number": _masked(LOWEST, HIDDEN),
    "a mask added": _added(torch.zeros(6, 9).masked_fill(HIDDEN, LOWEST)),
    "a bias added": _added(torch.randn(2, 1, 6, 9)),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_it_is_one_call(case, kernel_calls):
    compare(WRITTEN[case], *qkv(2, 4))
    (entry,) = fastattn.compile_report().swapped
    assert entry.before == "softmax(QKᵀ)V"
    assert len(kernel_calls) == 1


def test_batches_of_matrices(kernel_calls):
    compare(lambda q, k, v: torch.bmm(F.softmax(torch.bmm(q, k.mT), -1), v), *qkv(4))
    assert len(kernel_calls) == 1


@pytest.mark.parametrize("fill", [-math.inf, -1e9, LOWEST])
@pytest.mark.parametrize("added", [False, True])
def test_a_row_that_is_masked_whole_is_torchs(fill, added, kernel_calls):
    mask = torch.zeros(6, 9).masked_fill(ROW_HIDDEN, fill)
    call = _added(mask) if added else _masked(fill, ROW_HIDDEN)
    compare(call, *qkv(2, 4))
    assert fastattn.compile_report().swapped
    assert not kernel_calls


def test_what_is_no_mask_is_torchs(kernel_calls):
    compare(_masked(0.5, HIDDEN), *qkv(2, 4))
    compare(_added(torch.randn(3, 2, 1, 6, 9)), *qkv(2, 4))  # broadcasts the scores
    assert not kernel_calls


def _weights_read(q, k, v):
    weights = F.softmax(q @ k.mT, -1)
    return weights @ v + weights.sum()


def _scores_read(q, k, v):
    scores = q @ k.mT
    return F.softmax(scores, -1) @ v + scores.mean()


def _scores_changed(q, k, v):
    scores = q @ k.mT
    scores.mul_(0.5)
    return F.softmax(scores, -1) @ v


def _value_changed(q, k, v):
    own = v * 1.0
    weights = F.softmax(q @ k.mT, -1)
    own.mul_(2.0)
    return weights @ own


def _without_gradient(q, k, v):
    with torch.no_grad():
        weights = F.softmax(q @ k.mT, -1)
    return weights @ v


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (_weights_read, "its scores or its attention weights are read"),
        (_scores_read, "its scores or its attention weights are read"),
        (_scores_changed, "its scores or its attention weights are read"),
        (_value_changed, "something else may run between its two products"),
        (_without_gradient, "something else may run between its two products"),
        (lambda q, k, v: F.softmax(q @ k.mT, -2) @ v, ""),
        (lambda q, k, v: F.softmax(F.softmax(q @ k.mT, -1), -1) @ v, ""),
        (lambda q, k, v: F.softmax((q @ k.mT).tanh(), -1) @ v, ""),
    ],
)
def test_what_is_something_else_stays(call, reason, kernel_calls):
    inputs = qkv(2, 4)
    actual, expected = torch.compile(call, backend="fastattn")(*inputs), call(*inputs)
    torch.testing.assert_close(actual, expected)
    for found in (actual, expected):
        found.sum().backward()
    report = fastattn.compile_report()
    assert not report.swapped
    assert not kernel_calls
    assert [e.reason for e in report.skipped] == ([reason] if reason else [])


def test_dropout_is_the_kernels(kernel_calls):
    q, k, v = qkv(2, 4)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(F.softmax(q @ k.mT, -1), 0.25) @ v

    compiled = torch.compile(call, backend="fastattn")
    mean = torch.stack([compiled(q, k, torch.ones_like(v)) for _ in range(400)]).mean()
    assert mean.item() == pytest.approx(1.0, abs=0.02)
    assert [options["dropout_p"] for options in kernel_calls] == [0.25] * 400


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16])
def test_autocast(mask_dtype, kernel_calls):
    mask = torch.randn(6, 9, dtype=mask_dtype)
    q, k, v = (x.bfloat16() for x in qkv(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.compile(_added(mask), backend="fastattn")(q, k, v)
        expected = _added(mask)(q, k, v)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02)
    assert bool(kernel_calls) == (mask_dtype == torch.bfloat16)  # float32 would lose digits


class Gpt(nn.Module):
    """A causal layer as small GPTs write it, with a buffer for a mask."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (
            t.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for t in self.qkv(x).split(C, dim=2)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = self.drop(F.softmax(att, dim=-1)) @ v
        return self.out(y.transpose(1, 2).contiguous().view(B, T, C))


def test_a_gpt_in_training_at_all_lengths(kernel_calls):
    model = Gpt()
    compiled = torch.compile(model, backend="fastattn")
    for length in (8, 11, 5):
        x = torch.randn(2, length, 16)
        for call in (compiled, model):
            call(x).square().sum().backward()
        ours = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(x).square().sum().backward()
        for a, p in zip(ours, model.parameters(), strict=True):
            torch.testing.assert_close(a, 2 * p.grad, rtol=1e-3, atol=1e-5)
        model.zero_grad()
    assert len(kernel_calls) == 3
    assert fastattn.compile_report().graphs == 2


def test_bert_with_eager_attention(kernel_calls):
    pytest.importorskip("transformers")
    from tiny_models import TEXT, build

    model = build("BertModel", {**TEXT, "intermediate_size": 48}, "eager")
    given = {"input_ids": torch.randint(5, 99, (3, 12))}
    given["attention_mask"] = (torch.arange(12) < torch.tensor([[12], [7], [10]])).long()
    actual = torch.compile(model, backend="fastattn")(**given).last_hidden_state
    torch.testing.assert_close(actual, model(**given).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert len(kernel_calls) == 2


@pytest.mark.parametrize(
    ("op", "target", "pure"),
    [
        ("call_method", "__eq__", True),
        ("call_method", "masked_fill", True),
        ("call_method", "masked_fill_", False),
        ("call_method", "__iand__", False),
        ("call_method", "__setitem__", False),
        ("call_function", operator.and_, True),
        ("call_function", operator.iand, False),
        ("call_function", operator.ior, False),
        ("call_function", operator.setitem, False),
        ("call_function", operator.invert, True),
    ],
)
def test_which_nodes_change_nothing(op, target, pure):
    graph = torch.fx.Graph()
    node = graph.create_node(op, target, (graph.placeholder("a"), graph.placeholder("b")))
    node.meta["example_value"] = torch.ones(2)
    assert is_pure(node) == pure
