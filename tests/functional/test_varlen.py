"""Packed sequences: the reference gives what the kernels give, dropout's masks too."""

from __future__ import annotations

import pytest
import torch

import fastattn

pytestmark = pytest.mark.native
LENGTHS = {
    "several": ([3, 0, 5, 1], [4, 2, 0, 7]),
    "one": ([6], [5]),
    "none": ([], []),
}
OPTIONS = {
    "plain": {},
    "dropout": {"dropout_p": 0.4},
    "dropout of all": {"dropout_p": 1.0},
    "causal, window, softcap": {"is_causal": True, "window_size": (2, 1), "softcap": 3.0},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.9]).double(), "dropout_p": 0.2},
    "slopes of each": {"alibi_slopes": None},
}


def run(backend, lengths, dims, options, seed):
    torch.manual_seed(1)
    starts = [torch.tensor([0, *x]).cumsum(0) for x in lengths]
    q, k, v = (
        torch.randn(int(s[-1]), h, d, dtype=torch.float64, requires_grad=True)
        for s, h, d in zip((*starts, starts[1]), (4, 2, 2), dims, strict=True)
    )
    if "alibi_slopes" in options and options["alibi_slopes"] is None:
        options = options | {"alibi_slopes": torch.rand(len(lengths[0]), 4, dtype=torch.float64)}
    longest = [max([0, *x]) for x in lengths]
    torch.manual_seed(seed)
    out, lse = fastattn.varlen_attn(
        q, k, v, *starts, *longest, return_lse=True, backend=backend, **options
    )
    loss = (out * torch.arange(out.numel()).view(out.shape)).sum() + lse[lse.isfinite()].sum()
    return out, lse, *torch.autograd.grad(loss, (q, k, v)), torch.rand(())


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference_and_kernels(lengths, options):
    """The same seed gives the same mask, and leaves the generator in the same state."""
    for dims in ((8, 8, 6), (0, 0, 6), (8, 8, 0)):
        ours, reference = (run(b, lengths, dims, options, 5) for b in ("cpu", "reference"))
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
        assert reference[1].dtype == torch.float64


def test_another_seed_gives_another_mask():
    for backend in ("cpu", "reference"):
        one, other = (
            run(backend, LENGTHS["one"], (8, 8, 6), {"dropout_p": 0.4}, s) for s in (1, 2)
        )
        assert not torch.allclose(one[0], other[0])


def test_key_and_value_heads_that_divide_the_queries():
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 1, 8)
    starts = torch.tensor([0, 2, 5])
    expected = fastattn.varlen_attn(
        q, k.repeat_interleave(2, 1), v.expand(5, 4, 8), starts, starts, 3, 3
    )
    torch.testing.assert_close(fastattn.varlen_attn(q, k, v, starts, starts, 3, 3), expected)
