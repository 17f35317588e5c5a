"""override_sdpa: served calls run on fastattn, the rest on torch's own, and it always ends."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import fastattn

pytestmark = pytest.mark.native
TORCH = F.scaled_dot_product_attention


@pytest.fixture
def served(monkeypatch):
    """The calls that fastattn answered."""
    calls = []
    function = fastattn.functional.scaled_dot_product_attention

    def spy(*args, **options):
        out = function(*args, **options)
        calls.append(args)
        return out

    monkeypatch.setattr(fastattn.functional, "scaled_dot_product_attention", spy)
    return calls


def qkv(heads_k: int = 4, **options) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, h, 9, 8, **options) for h in (4, heads_k, heads_k)]


OPTIONS = {
    "plain": lambda: {},
    "causal": lambda: {"is_causal": True},
    "scale": lambda: {"scale": 0.3},
    "bool mask": lambda: {"attn_mask": torch.rand(2, 1, 9, 9) > 0.3},
    "float mask": lambda: {"attn_mask": torch.randn(9, 9, dtype=torch.float64)},
    "bias": lambda: {"attn_mask": causal_lower_right(9, 9)},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_same_results(case, served):
    options = OPTIONS[case]()
    inputs = qkv(dtype=torch.float64, requires_grad=True)
    expected = TORCH(*inputs, **options)
    with fastattn.override_sdpa():
        out = F.scaled_dot_product_attention(*inputs, **options)
    assert len(served) == 1
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 3, 5, 8),
    "heads inside": lambda: torch.randn(2, 5, 3, 8).transpose(1, 2),
    "a chunk": lambda: torch.randn(2, 5, 72).chunk(3, -1)[1].view(2, 5, 3, 8).transpose(1, 2),
    "sequence first": lambda: torch.randn(5, 2, 3, 8).permute(1, 2, 0, 3),
    "reversed": lambda: torch.randn(8, 5, 3, 2).permute(3, 2, 1, 0),
    "expanded": lambda: torch.randn(1, 3, 5, 8).expand(2, 3, 5, 8),
    "one query": lambda: torch.randn(2, 1, 3, 8).transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", ["none", "bool", "learned", "dropout"])
def test_the_result_lies_as_torchs(layout, mask, served):
    """Code may ``view`` it, which depends on its strides."""
    query, key, value = LAYOUTS[layout](), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    options = {
        "none": {},
        "bool": {"attn_mask": torch.ones(5, dtype=torch.bool).expand(query.shape[2], 5)},
        "learned": {"attn_mask": torch.zeros(query.shape[2], 5, requires_grad=True)},
        "dropout": {"dropout_p": 0.1},
    }[mask]
    expected = TORCH(query, key, value, **options)
    with fastattn.override_sdpa():
        out = F.scaled_dot_product_attention(query, key, value, **options)
    assert served
    there = [d for d in range(4) if out.shape[d] > 1]
    assert [out.stride(d) for d in there] == [expected.stride(d) for d in there]
    if mask != "dropout":
        torch.testing.assert_close(out, expected)


def test_gqa_and_dropout(served):
    q, k, v = qkv(2)
    with fastattn.override_sdpa():
        out = F.scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True)
        dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)
    assert len(served) == 2
    torch.testing.assert_close(out, TORCH(q, k, v, None, 0.0, True, enable_gqa=True))
    assert not torch.allclose(dropped, TORCH(q, k, v, enable_gqa=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, k[:, :1], v[:, :1]),
        lambda q, k, v: (q[:, :1], k, v),
        lambda q, k, v: (q[0], k, v[0, 0]),
        lambda q, k, v: (q[..., :0], k[..., :0], v),
    ],
)
def test_what_broadcasts(change, served):
    inputs = change(*qkv(dtype=torch.float64))
    with fastattn.override_sdpa():
        out = F.scaled_dot_product_attention(*inputs)
    assert len(served) == 1
    torch.testing.assert_close(out, TORCH(*inputs))


def test_torch_modules_use_it(served):
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = attention(x, x, x, need_weights=False)[0]
    with fastattn.override_sdpa():
        out = attention(x, x, x, need_weights=False)[0]
    assert len(served) == 1
    torch.testing.assert_close(out, expected)


# --- calls for torch's own ------------------------------------------------------------------------


class Logged(torch.Tensor):
    pass


def nested() -> list[torch.Tensor]:
    parts = [torch.randn(n, 4, 8) for n in (3, 5)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    return [x, x, x]


UNSERVED = {
    "subclass": lambda: [x.as_subclass(Logged) for x in qkv()],
    "nested": nested,
    "meta": lambda: qkv(device="meta"),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_what_is_not_served_goes_to_torch(case, served):
    inputs = UNSERVED[case]()
    expected = TORCH(*inputs)
    with fastattn.override_sdpa():
        out = F.scaled_dot_product_attention(*inputs, scale=8**-0.5)
    assert not served
    assert type(out) is type(expected)
    if case != "meta":
        flat = [x.values() if x.is_nested else torch.Tensor(x) for x in (out, expected)]
        torch.testing.assert_close(*flat)


def test_transforms_and_forward_mode_are_served(served):
    q, k, v = qkv()

    def modes():
        attention = F.scaled_dot_product_attention
        mapped = torch.vmap(attention)(q, k, v)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return mapped, *torch.func.jvp(attention, (q, k, v), (k, v, q))

    expected = modes()
    assert not served
    with fastattn.override_sdpa():
        torch.testing.assert_close(modes(), expected)
    assert len(served) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, k[..., :4], v),
        lambda q, k, v: (q, k.double(), v),
        lambda q, k, v: (q.long(), k.long(), v.long()),
        lambda q, k, v: (q, k, v, torch.ones(3, 3, dtype=torch.bool)),
        lambda q, k, v: (q, k, v, torch.ones(9, 9, dtype=torch.int64)),
        lambda q, k, v: (q, k, None),
        lambda q, k, v: (q, k[0, 0, 0], v),
        lambda q, k, v: (q, k[:, :3], v),
        lambda q, k, v: (q.to_sparse(), k, v[..., :3, :]),
    ],
)
def test_bad_input_raises_what_torch_raises(change):
    inputs = change(*qkv())
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        TORCH(*inputs)
    with fastattn.override_sdpa(), pytest.raises(expected.type):
        F.scaled_dot_product_attention(*inputs)


# --- coming and going -----------------------------------------------------------------------------


def test_it_ends_after_an_exception_and_nests():
    assert F.scaled_dot_product_attention is TORCH
    with pytest.raises(KeyError), fastattn.override_sdpa():
        ours = F.scaled_dot_product_attention
        with fastattn.override_sdpa():
            assert F.scaled_dot_product_attention is ours
        assert F.scaled_dot_product_attention is ours is not TORCH
        raise KeyError
    assert F.scaled_dot_product_attention is TORCH


def test_another_replacement_stays_beneath(monkeypatch, served):
    calls = []

    def other(*args, **options):
        calls.append(args)
        return TORCH(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", other)
    with fastattn.override_sdpa():
        F.scaled_dot_product_attention(*qkv())
        assert len(served) == 1
        assert not calls
        F.scaled_dot_product_attention(*nested())
        assert len(calls) == 1
    assert F.scaled_dot_product_attention is other


def test_threads_may_overlap():
    entered, first_left = threading.Event(), threading.Event()
    seen = []

    def second() -> None:
        with fastattn.override_sdpa():
            entered.set()
            first_left.wait(10)
            seen.append(F.scaled_dot_product_attention)

    thread = threading.Thread(target=second)
    with fastattn.override_sdpa():
        ours = F.scaled_dot_product_attention
        thread.start()
        assert entered.wait(10)
    first_left.set()
    thread.join()
    assert seen == [ours]
    assert F.scaled_dot_product_attention is TORCH


def test_as_a_decorator_and_compiled(served):
    @fastattn.override_sdpa()
    def run(function, *inputs):
        return function(*inputs)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) + 1

    q, k, v = qkv()
    expected = attend(q, k, v)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), expected)
    torch.testing.assert_close(run(compiled, q, k, v), expected)
    torch.testing.assert_close(compiled(q, k, v), expected)
    torch.testing.assert_close(run(attend, q, k, v), expected)
    assert len(served) >= 1
