"""What torch's scaled_dot_product_attention takes, ours takes: compared with torch's math path."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn

pytestmark = pytest.mark.native
TORCH = F.scaled_dot_product_attention
SEQ_Q, SEQ_K = 3, 5


def run(function, inputs, **options):
    """The result and the gradients of query, key and value."""
    out = function(*inputs, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def inputs_of(prefixes, head_dim: int = 4, head_dim_v: int = 6) -> list[torch.Tensor]:
    sizes = ((SEQ_Q, head_dim), (SEQ_K, head_dim), (SEQ_K, head_dim_v))
    return [
        torch.randn(*prefix, *size, dtype=torch.float64, requires_grad=True)
        for prefix, size in zip(prefixes, sizes, strict=True)
    ]


def compare(prefixes, backend: str, dims=(4, 6), **options) -> bool:
    """Whether both take it, and then give the same; else ours must name the argument."""
    inputs = inputs_of(prefixes, *dims)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            expected = run(TORCH, inputs, **options)
    except (RuntimeError, IndexError):
        with pytest.raises(ValueError, match=r"^(query|key|value): expected .*, got "):
            fastattn.scaled_dot_product_attention(*inputs, **options)
        return False
    ours = run(fastattn.scaled_dot_product_attention, inputs, backend=backend, **options)
    if inputs[2].numel() == 0 and not options.get("enable_gqa"):
        # Where there is nothing to add up torch answers at once, in query's shape. The values are
        # the same, none or 0.
        shape = torch.broadcast_shapes(*prefixes)
        expected[0] = expected[0].new_zeros(*shape, *expected[0].shape[-2:])
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    return True


BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


@BACKENDS
def test_every_rank_and_broadcast(backend):
    prefixes = [(), (1,), (4,), (3,), (1, 4), (2, 1), (2, 4), (3, 1, 1), (1, 2, 4)]
    taken = sum(compare(each, backend) for each in itertools.product(prefixes, repeat=3))
    assert taken == 573  # of 729


@BACKENDS
def test_every_grouping(backend):
    prefixes = [(1,), (2,), (3,), (4,), (6,), (2, 1), (1, 2), (2, 4), (2, 6)]
    taken = sum(
        compare(each, backend, enable_gqa=True) for each in itertools.product(prefixes, repeat=3)
    )
    assert taken == 219  # of 729


@BACKENDS
def test_batches_of_0(backend):
    for each in itertools.product([(0, 4), (1, 4), (4,), (0, 1)], repeat=3):
        assert compare(each, backend)


@BACKENDS
@pytest.mark.parametrize("dims", [(0, 6), (4, 0), (0, 0)])
def test_head_dims_of_0(backend, dims):
    prefixes = [(), (1,), (2, 4), (2, 1)]
    for each in itertools.product(prefixes, repeat=3):
        for options in ({}, {"is_causal": True}, {"scale": 2.0}, {"dropout_p": 1.0}):
            assert compare(each, backend, dims, **options)
        mask = torch.randn(SEQ_Q, SEQ_K, dtype=torch.float64)
        assert compare(each, backend, dims, attn_mask=mask)


@BACKENDS
@pytest.mark.parametrize("p", [1, 1.0, True])
def test_dropping_everything(backend, p):
    for each in [((), (), ()), ((2, 4), (2, 1), (4,))]:
        assert compare(each, backend, dropout_p=p)
    q, k, v = inputs_of([(2, 4)] * 3)
    out, lse = fastattn.scaled_dot_product_attention(
        q, k, v, dropout_p=p, return_lse=True, backend=backend
    )
    assert not out.any()
    expected = fastattn.scaled_dot_product_attention(q, k, v, return_lse=True)[1]
    torch.testing.assert_close(lse, expected)


def test_masks_broadcast_with_the_scores():
    q, k, v = inputs_of([(4,), (2, 1), (2, 4)])
    for shape in [(SEQ_K,), (SEQ_Q, SEQ_K), (4, 1, SEQ_K), (2, 1, SEQ_Q, 1), (2, 4, SEQ_Q, SEQ_K)]:
        mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        with sdpa_kernel(SDPBackend.MATH):
            expected = TORCH(q, k, v, mask)
        out = fastattn.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
        grads = [torch.autograd.grad(x.square().sum(), mask)[0] for x in (out, expected)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", [((6,), (1,), (1,)), ((1,), (6,), (6,)), ((6,), (6,), (1,))])
def test_heads_that_broadcast_are_not_copied(heads, monkeypatch):
    """The kernels get the caller's memory; one key head for all is their own grouping."""
    seen = []
    attention_forward = fastattn.ops.attention_forward

    def spy(*args):
        seen.append(args[0][:3])
        return attention_forward(*args)

    monkeypatch.setattr(fastattn.ops, "attention_forward", spy)
    inputs = inputs_of([(2, *h) for h in heads])
    fastattn.scaled_dot_product_attention(*inputs)
    (given,) = seen
    assert [x.data_ptr() for x in given] == [x.data_ptr() for x in inputs]
    assert given[1].shape[1] == given[2].shape[1] == (1 if heads[1:] == ((1,), (1,)) else 6)


@pytest.mark.parametrize(
    "scale", [0.5, 1, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), True]
)
def test_numbers_are_what_torch_takes(scale):
    inputs = inputs_of([(2, 4)] * 3)
    ours = fastattn.scaled_dot_product_attention(*inputs, scale=scale)
    torch.testing.assert_close(ours, TORCH(*inputs, scale=float(scale)))


def test_numpy_numbers():
    numpy = pytest.importorskip("numpy")
    inputs = inputs_of([(2, 4)] * 3)
    for kind in (numpy.float64, numpy.float32, numpy.float16, numpy.int64, numpy.int8):
        ours = fastattn.scaled_dot_product_attention(*inputs, scale=kind(1), dropout_p=kind(0))
        torch.testing.assert_close(ours, TORCH(*inputs, scale=1.0))
        window = fastattn.scaled_dot_product_attention(*inputs, window_size=(numpy.int64(1), 0))
    expected = fastattn.scaled_dot_product_attention(*inputs, window_size=(1, 0))
    torch.testing.assert_close(window, expected)


@BACKENDS
@pytest.mark.parametrize("huge", [2**60 - 1, 2**60, 2**63, 10**30])
def test_a_huge_window_is_unbounded(backend, huge):
    inputs = inputs_of([(2, 4)] * 3)
    starts = torch.tensor([0, 1, 4])
    for window in ((huge, huge), (huge, 0), (0, huge)):
        expected = tuple(-1 if w == huge else w for w in window)
        out, wanted = (
            fastattn.scaled_dot_product_attention(*inputs, window_size=w, backend=backend)
            for w in (window, expected)
        )
        torch.testing.assert_close(out, wanted)
        packed = [x[0, :, :1].expand(4, 4, -1) for x in inputs]
        out, wanted = (
            fastattn.varlen_attn(*packed, starts, starts, 3, huge, window_size=w, backend=backend)
            for w in (window, expected)
        )
        torch.testing.assert_close(out, wanted)


def test_softcap_none_is_0():
    inputs = inputs_of([(2, 4)] * 3)
    out = fastattn.scaled_dot_product_attention(*inputs, softcap=None)
    torch.testing.assert_close(out, fastattn.scaled_dot_product_attention(*inputs))


def test_other_modes_of_differentiation():
    q, k, v = inputs_of([(2, 2), (1,), (1, 2)], 2, 1)
    attention = fastattn.scaled_dot_product_attention
    assert torch.autograd.gradcheck(attention, (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attention, (q, k, v))
    mapped = torch.vmap(attention, in_dims=(0, None, 0))(q, k, v.expand(2, -1, -1, -1))
    torch.testing.assert_close(mapped, attention(q, k, v))
