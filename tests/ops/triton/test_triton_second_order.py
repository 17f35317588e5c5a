"""Forward mode and double backward of the Triton attention kernels against derivatives of the
oracle: every option, over small odd shapes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from second_order import ALL, NAMES, Case, nan_where
from test_triton_attention import CHOSEN, DTYPES, MASKS, SHAPES, bound

from fastattn import ops
from fastattn.ops.triton import config
from fastattn.testing import OPTIONS, assert_close

pytestmark = pytest.mark.triton


def check_case(case: Case, present=ALL, needs=(True,) * 5, lse_gradient=True) -> None:
    """The double backward, whose first two results are the jvp's."""
    out, lse, *softmax = case.op("attention_forward")
    tangents = case.tangents(present)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse) if lse_gradient else None
    needs = [*needs[:4], needs[4] and case.differentiable[3]]
    t_out, t_lse, *grads = case.op(
        "attention_double_backward",
        grad_out,
        grad_lse,
        between=(*tangents, out, *softmax),
        after=(needs,),
    )
    if needs[0]:
        expected_out, expected_lse = case.expected_jvp(tangents)
        assert t_out.dtype == case.dtype
        assert t_lse.dtype == lse.dtype
        size = expected_out.abs().max().cpu() + 1
        assert_close("t_out", t_out, expected_out, bound(case.dtype, size, 8))
        size = expected_lse.abs().max().cpu() + 1
        assert_close("t_lse", t_lse, expected_lse, bound(t_lse.dtype, size, 8))
    if not any(needs[1:]):
        return
    expected = case.expected_double(grad_out, grad_lse, tangents)
    for name, needed, grad, wanted in zip(NAMES, needs[1:], grads, expected, strict=True):
        if not needed:
            assert grad.shape == (0,), name
            continue
        assert grad.dtype == case.dtype
        assert_close(name, grad, wanted, bound(case.dtype, wanted.abs().max().cpu() + 1, 8))


SMALL = (2, 2, 1, 17, 18, 6, 5)


@pytest.mark.parametrize("shape", [SHAPES["square"], (2, 4, 2, 17, 18, 24, 8)], ids=str)
@pytest.mark.parametrize("options", CHOSEN)
def test_options(options, shape, device):
    check_case(Case(shape, OPTIONS[options], "none", torch.float32, device))


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("shape", ["more queries", "one query"])
def test_shapes(shape, options, device):
    check_case(Case(SHAPES[shape], OPTIONS[options], "none", torch.float32, device))


@pytest.mark.parametrize("options", ["left window, causal", "everything"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, options, device):
    check_case(Case(SMALL, OPTIONS[options], mask, torch.float64, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "blocks", "shared float, hidden"])
def test_dtypes(mask, dtype, device):
    check_case(Case((1, 2, 1, 17, 33, 24, 8), OPTIONS["everything"], mask, dtype, device))


@pytest.mark.parametrize("present", [*itertools.product([True, False], repeat=4)][1:-1], ids=str)
def test_absent_tangents(present, device):
    options = {"softcap": 0.8, "dropout_p": 0.2, "is_causal": True}
    check_case(Case((1, 1, 1, 5, 18, 5, 7), options, "key bias", torch.float64, device), present)


@pytest.mark.parametrize("one", range(5))
def test_needs(one, device):
    case = Case((1, 2, 2, 17, 18, 5, 7), {}, "shared float, hidden", torch.float64, device)
    check_case(case, needs=[n == one for n in range(5)], lse_gradient=one % 2 == 0)


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_a_seed_for_each_share_of_the_batch(seeds, device):
    case = Case(
        (4, 1, 1, 5, 18, 4, 4), {"dropout_p": 0.4}, "key bias", torch.float64, device, seeds
    )
    torch.testing.assert_close(case.op("attention_forward")[:2], case.oracle(*case.wide()))
    check_case(case)


@pytest.mark.parametrize("mask", ["none", "shared float, hidden"])
def test_tensor_descriptors(mask, device, monkeypatch):
    monkeypatch.setattr(config, "INTERPRETED", config.INTERPRETED._replace(tma=True))
    case = Case((1, 2, 1, 33, 20, 16, 8), OPTIONS["everything"], mask, torch.float32, device)
    case.inputs[0] = case.inputs[0].contiguous()
    check_case(case)


def double_backward(case: Case, grad_out, grad_lse, tangents, out, *softmax):
    needs = [True] * 4 + [case.differentiable[3]]
    return case.op(
        "attention_double_backward",
        grad_out,
        grad_lse,
        between=(*tangents, out, *softmax),
        after=(needs,),
    )


@pytest.mark.parametrize("kind", ["bool", "float", "causal", "window"])
def test_hidden_keys_and_their_tangents_never_matter(kind, device):
    options = {"causal": {"is_causal": True}, "window": {"window_size": (-1, 2)}}.get(kind, {})
    case = Case((1, 2, 2, 20, 24, 8, 8), {"softcap": 1.5} | options, "none", torch.float32, device)
    hidden = torch.zeros(24, dtype=torch.bool, device=device)
    hidden[22:] = True
    if kind in ("bool", "float"):
        hidden[3] = True
        mask = ~hidden[None, None, None]
        if kind == "float":
            mask = torch.zeros(1, 1, 1, 24, device=device).masked_fill(hidden, -math.inf)
        case.inputs[3] = mask
        case.differentiable[3] = kind == "float"
    out, lse, *softmax = case.op("attention_forward")
    tangents, cotangents = case.tangents(), (torch.randn_like(out), torch.randn_like(lse))
    clean = double_backward(case, *cotangents, tangents, out, *softmax)
    case.inputs[1] = nan_where(case.inputs[1], hidden)
    case.inputs[2] = nan_where(case.inputs[2], hidden, math.inf)
    tangents[1] = nan_where(tangents[1], hidden)
    tangents[2] = nan_where(tangents[2], hidden, -math.inf)
    if tangents[3] is not None:
        tangents[3][..., hidden] = math.nan
    results = double_backward(case, *cotangents, tangents, out, *softmax)
    torch.testing.assert_close(results, clean)
    assert not results[3][:, :, hidden].any()
    assert not results[4][:, :, hidden].any()


def test_empty_rows_with_nan_harm_nobody(device):
    case = Case((1, 1, 1, 20, 20, 8, 8), {"softcap": 1.5}, "none", torch.float32, device)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool, device=device)
    mask[:, :, 5] = False
    case.inputs[3] = mask
    out, lse, *softmax = case.op("attention_forward")
    tangents, cotangents = case.tangents(), [torch.randn_like(out), torch.randn_like(lse)]
    clean = double_backward(case, *cotangents, tangents, out, *softmax)
    empty = ~mask.any(-1)[0, 0]
    case.inputs[0] = nan_where(case.inputs[0], empty)
    tangents[0] = nan_where(tangents[0], empty, math.inf)
    cotangents[0] = nan_where(cotangents[0], empty)
    cotangents[1] = cotangents[1].masked_fill(empty, math.nan)
    results = double_backward(case, *cotangents, tangents, out, *softmax)
    torch.testing.assert_close(results, clean)
    assert not results[0][:, :, empty].any()
    assert not results[1][:, :, empty].any()
    assert not results[2][:, :, empty].any()


@pytest.mark.parametrize("seeds", [1, 4])
def test_packed_sequences(seeds, device):
    """Each sequence alone is a case of its own, with its own seed if there is one for each."""
    lengths_q, lengths_k = [3, 0, 20, 17], [4, 2, 18, 0]
    options = {"is_causal": True, "dropout_p": 0.3, "softcap": 1.2, "alibi_slopes": True}
    packed = Case((1, 4, 2, 40, 24, 6, 5), options, "none", torch.float64, device)
    packed.options["alibi_slopes"] = packed.options["alibi_slopes"][0]
    packed.seed = torch.arange(seeds, device=device) + 77
    starts = [torch.tensor([0, *n], device=device).cumsum(0).int() for n in (lengths_q, lengths_k)]

    def op(name, *before, between=(), after=()):
        extras = packed.extras._replace(starts_q=starts[0], starts_k=starts[1])
        numbers = packed.numbers._replace(max_q=20, max_k=18)
        return getattr(torch.ops.fastattn_triton, name)(
            *before, *packed.inputs, *extras, *between, *numbers, *after
        )

    out, lse, *softmax = op("attention_forward")
    tangents, grad_out, grad_lse = packed.tangents(), torch.randn_like(out), torch.randn_like(lse)
    results = op(
        "attention_double_backward", grad_out, grad_lse, between=(*tangents, out, *softmax),
        after=([True] * 4 + [False],),
    )  # fmt: skip
    assert results[0].transpose(1, 2).is_contiguous()
    alone = Case((1, 4, 2, 1, 1, 6, 5), options, "none", torch.float64, device)
    alone.options["alibi_slopes"] = packed.options["alibi_slopes"]
    everything = [*packed.inputs[:3], *tangents[:3], grad_out, grad_lse[..., None], *results]
    everything[9] = everything[9][..., None]
    on_queries = (0, 3, 6, 7, 8, 9, 10)
    pieces = [
        x.split(lengths_q if n in on_queries else lengths_k, 2)
        for n, x in enumerate(everything[:13])
    ]
    for b, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        q, k, v, t_q, t_k, t_v, do, dlse, *actual = (piece[b] for piece in pieces)
        if length_q == 0 or length_k == 0:
            assert not any(x.any() for x in actual)
            continue
        # The oracle's batch index counts, so that the sequence stands in its place in a batch.
        place = 1 if seeds > 1 else b + 1
        alone.seed = packed.seed[b : b + 1] if seeds > 1 else packed.seed
        alone.inputs = [x.repeat(place, 1, 1, 1) for x in (q, k, v)] + [None]
        given = [x.repeat(place, 1, 1, 1) for x in (t_q, t_k, t_v)] + [None]
        t_out, t_lse = alone.expected_jvp(given)
        *grads, _ = alone.expected_double(
            do.expand(place, -1, -1, -1), dlse[..., 0].expand(place, -1, -1), given
        )
        expected = [x[-1:] for x in (t_out, t_lse[..., None], *grads)]
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 3, 4), (2, 0, 3, 3, 4), (2, 2, 0, 3, 4), (1, 2, 3, 0, 4)], ids=str
)
def test_sizes_of_zero(shape, device):
    batch, heads, seq_q, seq_k, dim = shape
    case = Case((batch, heads, heads, seq_q, seq_k, dim, dim), {}, "none", torch.float32, device)
    case.inputs[3] = torch.zeros(1, 1, 1, 1, device=device)
    case.differentiable[3] = True
    out, lse, *softmax = case.op("attention_forward")
    tangents = case.tangents()
    results = double_backward(case, torch.ones_like(out), None, tangents, out, *softmax)
    assert [r.shape for r in results] == [out.shape, lse.shape, *(x.shape for x in case.inputs)]
    assert not any(r.any() for r in results)


def test_any_strides_and_more_than_one_batch_dimension(device):
    case = Case((6, 2, 1, 5, 18, 3, 5), {"alibi_slopes": True}, "none", torch.float64, device)
    case.inputs[3] = torch.randn(1, 2, 5, 1, dtype=torch.float64, device=device)
    case.differentiable[3] = True
    tangents = case.tangents()
    grad_lse = torch.randn(6, 2, 5, dtype=torch.float64, device=device)
    grad_out = torch.randn(5, dtype=torch.float64, device=device).expand(6, 2, 5, 5)
    case.options["alibi_slopes"] = case.options["alibi_slopes"][::3].contiguous()
    case.inputs[3] = case.inputs[3][None]
    # [2, 3, ...] instead of [6, ...]; the first dimension's slopes are those of elements 0 and 3
    slopes = case.options["alibi_slopes"].repeat_interleave(3, 0)
    flat = Case((6, 2, 1, 5, 18, 3, 5), {"alibi_slopes": True}, "none", torch.float64, device)
    flat.inputs = [*case.inputs[:3], case.inputs[3][0]]
    flat.differentiable, flat.options["alibi_slopes"] = case.differentiable, slopes
    out, _, *softmax = flat.op("attention_forward")
    expected = double_backward(flat, grad_out, grad_lse, tangents, out, *softmax)
    case.inputs[:3] = (x.unflatten(0, (2, 3)) for x in case.inputs[:3])

    def scattered(x):
        """The same numbers, with no unit stride at all."""
        wide = x.new_empty((*x.shape[:-1], 2 * x.shape[-1]))
        wide[..., ::2] = x
        return wide.unflatten(0, (2, 3))[..., ::2]

    moved = [*map(scattered, tangents[:3]), tangents[3][None].expand(1, 1, 2, 5, 1)]
    results = double_backward(
        case, grad_out.unflatten(0, (2, 3)), scattered(grad_lse), moved, scattered(out),
        *map(scattered, softmax),
    )  # fmt: skip
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual.reshape(wanted.shape), wanted)


def test_the_same_call_is_bitwise_equal_and_its_fake_agrees(device):
    case = Case((2, 1, 1, 5, 18, 6, 5), {"dropout_p": 0.2}, "key bias", torch.float32, device, 2)
    out, lse, *softmax = case.op("attention_forward")
    tangents = case.tangents()
    runs = [double_backward(case, out, lse, tangents, out, *softmax) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    tests = ("test_schema", "test_faketensor")
    given = (*case.inputs, *case.extras, *tangents, out, *softmax, *case.numbers)
    for needs in ([True] * 5, [False, True, False, False, False]):
        torch.library.opcheck(
            torch.ops.fastattn_triton.attention_double_backward,
            (out, lse, *given, needs),
            test_utils=tests,
        )
    torch.library.opcheck(
        torch.ops.fastattn_triton.attention_jvp,
        given,
        test_utils=tests,
    )


@pytest.mark.parametrize(
    "argument, change",
    [
        ("seed", {"seed": torch.zeros(3, dtype=torch.int64)}),
        ("seed", {"seed": torch.zeros(0, dtype=torch.int64)}),
        ("t_query", {"t_query": torch.zeros(4, 2, 5, 7)}),
        ("t_value", {"t_value": torch.zeros(4, 2, 5, 8).double()}),
        ("t_mask", {"t_mask": torch.zeros(1, 1, 1, 5)}),
        ("out", {"out": torch.zeros(4, 2, 5, 7)}),
        ("row_max", {"row_max": torch.zeros(4, 2, 4)}),
        ("log_sum", {"log_sum": torch.zeros(4, 2, 5).double()}),
    ],
)
def test_a_direct_call_with_bad_metadata_raises(argument, change, device):
    q = torch.randn(4, 2, 5, 8, device=device)
    seed = torch.zeros(2, dtype=torch.int64, device=device)
    groups = (
        ops.Inputs(q, q, q), ops.Extras(seed=seed), ops.Results(q, q[..., 0], q[..., 0]),
        ops.Options(dropout_p=0.5),
    )  # fmt: skip
    good = dict.fromkeys(("t_query", "t_key", "t_value", "t_mask"))
    good |= {name: x for group in groups for name, x in group._asdict().items()}
    change = {name: x.to(device) for name, x in change.items()}
    with pytest.raises(RuntimeError, match=f"{argument}: expected .*, got"):
        torch.ops.fastattn_triton.attention_jvp(**(good | change))
