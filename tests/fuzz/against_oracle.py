"""One fuzzed problem: the kernels beside the reference in float64."""

from __future__ import annotations

import math

import torch
from drawn import DROPOUT_SEED, Problem
from torch import Tensor

from fastattn.testing import unit_roundoff


def results(problem: Problem, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """The outputs, the gradients and the second derivatives up to the problem's order, under the
    same random numbers."""
    leaves = [x.to(dtype) for x in problem.leaves]
    if problem.order:
        leaves = [x.detach().requires_grad_() for x in leaves]
    torch.default_generator.manual_seed(DROPOUT_SEED)
    outs = problem.run(leaves, backend)
    found = {f"result {i}": x.detach() for i, x in enumerate(outs)}
    if problem.order == 0:
        return found
    draws = torch.Generator().manual_seed(6)

    def like(x: Tensor) -> Tensor:
        wide = torch.randn(x.shape, generator=draws, dtype=torch.float64)
        return wide.to(problem.leaves[0].dtype).to(x.dtype)

    # A log-sum-exp of -inf has no gradient to weigh.
    cotangents = [torch.where(x.detach() == -math.inf, 0.0, like(x)) for x in outs]
    for c in cotangents:
        c.requires_grad_(problem.order > 1)
    # Without keys nothing depends on anything, and a backend may say so.
    pairs = [(x, c) for x, c in zip(outs, cotangents, strict=True) if x.requires_grad]
    outs, cotangents = [x for x, _ in pairs], [c for _, c in pairs]
    grads = torch.autograd.grad(outs, leaves, cotangents, create_graph=problem.order > 1)
    found |= {f"gradient {i}": x.detach() for i, x in enumerate(grads)}
    if problem.order == 1:
        return found
    tangents = [like(g) for g in grads]
    pairs = [(g, t) for g, t in zip(grads, tangents, strict=True) if g.requires_grad]
    grads, tangents = [g for g, _ in pairs], [t for _, t in pairs]
    inputs = [*leaves, *cotangents]
    second = (
        torch.autograd.grad(grads, inputs, tangents, allow_unused=True, materialize_grads=True)
        if grads
        else [torch.zeros_like(x) for x in inputs]
    )
    return found | {f"second {i}": x for i, x in enumerate(second)}


def worst_error(problem: Problem) -> dict[str, float]:
    """The largest error of each result, over what is allowed. Raises AssertionError above 1, and
    for a NaN or an infinity in one result alone.

    Allowed is twice the reference's error in the problem's dtype, and the rounding of the results,
    of terms that cancel in them, and of scores in the accumulator: a score of size s moves a
    weight by s roundings.
    """
    dtype = problem.leaves[0].dtype
    torch.set_num_threads(problem.threads)
    actual = results(problem, dtype, "cpu")
    expected = results(problem, torch.float64, "reference")
    if not problem.whole:
        _compare_nans(problem, actual, expected)
        return {}
    peer: dict[str, Tensor] = {}
    scales, found = problem.terms(problem), {}
    names = {**actual, **expected}
    if any(
        float(x.abs().nan_to_num(0.0, 0.0, 0.0).max()) > torch.finfo(dtype).max
        for name, x in expected.items()
        if name.startswith("result") and x.numel()
    ):
        # An output that overflowed is infinite, and no derivative of it is a number.
        names = {name: None for name in names if name.startswith("result")}
    for name in names:
        zero = torch.zeros(())  # None stands for it
        ours, oracle = actual.get(name, zero), expected.get(name, zero)
        if name in actual and name in expected:
            assert ours.shape == oracle.shape, f"{name}: shape {tuple(ours.shape)}"
            assert ours.dtype in (dtype, torch.float32), f"{name}: dtype {ours.dtype}"
        ours, oracle = torch.broadcast_tensors(ours, oracle)
        over = _over_allowed(problem, ours, oracle, oracle, scales.get(name, 0.0))
        if over > 1.0:
            peer = peer or results(problem, dtype, "reference")
            over = _over_allowed(problem, ours, oracle, peer.get(name, zero), scales.get(name, 0.0))
        assert over <= 1.0, f"{name}: {over:.3g} times the allowed error"
        found[name] = over
    return found


def _compare_nans(problem: Problem, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """A NaN of a query or key is in the same results. One of a value is in the rows that see its
    key; in other rows the reference has it as 0 times NaN, and the kernels need not."""
    q, k, v, *mask = problem.leaves
    if not v.isnan().any():
        for name, oracle in expected.items():
            assert actual[name].isnan().equal(oracle.isnan()), f"{name}: NaN elsewhere"
        return
    torch.default_generator.manual_seed(DROPOUT_SEED)
    leaves = [q, k, v.isnan(), *mask]
    shown = problem.run([x.double() for x in leaves], "reference")[0]
    nan, may = actual["result 0"].isnan(), expected["result 0"].isnan()
    assert not (nan & ~may).any(), "result 0: NaN of a value that nothing shows"
    assert nan[shown > 1e-30].all(), "result 0: NaN of a value is lost"
    assert actual["result 1"].isfinite().equal(expected["result 1"].isfinite()), "LSE: NaN"


def _over_allowed(
    problem: Problem, ours: Tensor, oracle: Tensor, peer: Tensor, terms: float
) -> float:
    """The largest error over what is allowed; infinite for a NaN or an infinity on one side."""
    if not ours.numel():
        return 0.0
    dtype, most = problem.leaves[0].dtype, torch.finfo(ours.dtype).max
    # A number too large for the dtype is infinite in it, and no number where infinities meet. The
    # kernels may have a number where torch, which rounds more often, has none.
    exact = oracle.double()
    beyond = exact.isfinite() & ((exact.abs() > most) | ~(peer.isfinite() | ours.isfinite()))
    oracle = torch.where(beyond, peer.double(), exact)
    numbers, theirs = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (oracle, peer))
    theirs = torch.where(peer.isfinite(), theirs, numbers)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    accumulator, rounding = unit_roundoff(wide), unit_roundoff(dtype)
    allowed = 2 * float((theirs - numbers).abs().max())
    allowed += 4 * torch.finfo(dtype).tiny  # subnormal results may be flushed
    size = float(numbers.abs().max()) + terms
    allowed += 8 * size * (rounding + accumulator * (1 + problem.score))
    if dtype == torch.float64:  # the oracle is no wider: both round each of a sum's terms
        allowed += 2 * size * rounding * max(max(x.shape, default=0) for x in problem.leaves)
    # An error decides on which side of the largest number a result near it is.
    near = (exact.abs() - most).abs() <= allowed
    oracle, ours = oracle.masked_fill(near, 0.0), ours.masked_fill(near, 0.0)
    same = [torch.equal(f(ours), f(oracle)) for f in (torch.isnan, torch.isposinf, torch.isneginf)]
    if not all(same):
        return math.inf
    oracle, ours = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (oracle, ours))
    return float((ours - oracle).abs().max()) / allowed


def run(problem: Problem) -> tuple[str | None, float]:
    """What is wrong, None for nothing, and the largest error over what is allowed."""
    try:
        return None, max(worst_error(problem).values(), default=0.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0], math.inf
