"""The oracle against what it does not share code with: torch's own attention, element-by-element
loops, published random numbers, numerical derivatives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn import reference
from fastattn.testing import OPTIONS, make_mask

CHOSEN = (
    "plain", "causal", "window", "one-sided window", "softcap", "alibi", "negative scale",
    "everything",
)  # fmt: skip


def options_of(name: str) -> dict[str, object]:
    """Without the dropout, which has a test of its own, and with drawn slopes."""
    options = {key: value for key, value in OPTIONS[name].items() if key != "dropout_p"}
    if "alibi_slopes" in options:
        shape = (2, 4) if name == "everything" else (4,)
        options["alibi_slopes"] = torch.rand(shape, dtype=torch.float64)
    return options


def inputs(seq_q: int = 5, seq_k: int = 7, heads_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, 4, seq_q, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, heads_k, seq_k, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, heads_k, seq_k, 2, dtype=torch.float64, requires_grad=True)
    return q, k, v


def attention_by_loops(
    query, key, value, mask, is_causal=False, scale=None, window_size=None, softcap=0.0, **extras
) -> tuple[Tensor, Tensor]:
    """The contract's definition, one element at a time, on Python floats."""
    batches, heads, seq_q, dim = query.shape
    seq_k, group = key.shape[2], heads // key.shape[1]
    scale = dim**-0.5 if scale is None else scale
    left, right = window_size or (-1, -1)
    slopes = extras.get("alibi_slopes")
    out = torch.zeros(batches, heads, seq_q, value.shape[-1], dtype=torch.float64)
    lse = torch.full((batches, heads, seq_q), -math.inf, dtype=torch.float64)
    for b in range(batches):
        for h in range(heads):
            for i in range(seq_q):
                weights = {}
                for j in range(seq_k):
                    hidden = is_causal and j > i
                    hidden |= left >= 0 and j < i - left
                    hidden |= right >= 0 and j > i + right
                    bias = 0.0 if mask is None else mask.expand(batches, heads, seq_q, seq_k)
                    bias = bias if mask is None else bias[b, h, i, j].item()
                    if hidden or bias is False or bias == -math.inf:
                        continue
                    s = scale * sum(
                        query[b, h, i, d].item() * key[b, h // group, j, d].item()
                        for d in range(dim)
                    )
                    if softcap:
                        s = softcap * math.tanh(s / softcap)
                    if slopes is not None:
                        slope = slopes[b, h] if slopes.dim() == 2 else slopes[h]
                        s -= slope.item() * abs(i - j)
                    weights[j] = math.exp(s + (0.0 if bias is True else bias))
                total = sum(weights.values())
                if not weights:
                    continue
                lse[b, h, i] = math.log(total)
                for j, weight in weights.items():
                    out[b, h, i] += weight / total * value[b, h // group, j].detach()
    return out, lse


@pytest.mark.parametrize("mask", ["none", "shared bool, hidden", "shared float, hidden"])
@pytest.mark.parametrize("options", CHOSEN)
def test_attention_is_its_definition(options, mask):
    mask, options = make_mask(mask, (2, 4, 5, 7), torch.float64), options_of(options)
    tensors = inputs()
    out, lse = reference.attention(*tensors, mask, **options)
    torch.testing.assert_close((out, lse), attention_by_loops(*tensors, mask, **options))


@pytest.mark.parametrize("mask", ["none", "shared bool, hidden", "shared float, hidden"])
@pytest.mark.parametrize("options", CHOSEN)
def test_the_written_out_gradients_are_autograds(options, mask):
    tensors, mask = inputs(), make_mask(mask, (2, 4, 5, 7), torch.float64)
    seed = torch.tensor([77])
    options = options_of(options) | {"seed": seed, "dropout_p": 0.3}
    if mask is not None and mask.dtype != torch.bool:
        mask.requires_grad_()
    out, lse = reference.attention(*tensors, mask, **options)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    wanted = [x for x in (*tensors, mask) if x is not None and x.requires_grad]
    seen = lse != -math.inf
    loss = (out * grad_out).sum() + (lse[seen] * grad_lse[seen]).sum()
    expected = torch.autograd.grad(loss, wanted)
    detached = [x if x is None else x.detach() for x in (*tensors, mask, out, lse)]
    grads = reference.attention_backward(grad_out, grad_lse, *detached, **options)
    torch.testing.assert_close([g for g in grads if g is not None], list(expected))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("mask", ["none", "shared bool, hidden", "shared float, hidden"])
def test_attention_is_torchs(options, mask):
    q, k, v = inputs()
    mask = make_mask(mask, (2, 4, 5, 7), torch.float64)
    passed = mask
    if mask is not None and options.get("is_causal"):
        causal = torch.ones(5, 7, dtype=torch.bool).tril()  # torch takes one of the two
        passed = mask & causal if mask.dtype == torch.bool else mask.where(causal, -math.inf)
        passed, torch_options = passed, {}
    else:
        torch_options = options
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, passed, enable_gqa=True, **torch_options)
    torch.testing.assert_close(reference.attention(q, k, v, mask, **options)[0], expected)


@pytest.mark.parametrize("options", CHOSEN)
def test_first_and_second_derivatives(options):
    tensors = inputs(3, 4, heads_k=4)
    mask = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    mask[:, :, 0, 0] = -math.inf  # an empty row where the window or the causal mask hides the rest
    options = options_of(options) | {"seed": torch.tensor([9]), "dropout_p": 0.2}

    def function(q, k, v, bias):
        out, lse = reference.attention(q, k, v, mask + bias, **options)
        return out, torch.where(lse == -math.inf, 0.0, lse)

    bias = torch.randn(1, 1, 3, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (*tensors, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (*tensors, bias), fast_mode=True)


def test_linear_relu_and_its_written_out_gradients():
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, dtype=torch.float64, requires_grad=True)
    out, passes = reference.linear_relu_forward(x, w, b)
    torch.testing.assert_close(out, (x @ w.T + b).clamp(min=0))
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(reference.linear_relu(x, w, b), (x, w, b), grad)
    torch.testing.assert_close(reference.linear_relu_backward(grad, x, w, passes), expected)
    functions = (
        reference.linear_relu,
        lambda x, w, b: reference.mlp(x, [w, w[:2, :] @ w.T], [b, None]),
    )
    for function in functions:
        assert torch.autograd.gradcheck(function, (x, w, b))
        assert torch.autograd.gradgradcheck(function, (x, w, b))


# The known answers that come with Random123 (Salmon et al., SC'11) for philox4x32, 10 rounds.
PHILOX = [
    ("0" * 32, "0" * 16, "6627e8d5e169c58dbc57ac4c9b00dbd8"),
    ("f" * 32, "f" * 16, "408f276d41c83b0ea20bc7c66d5451fd"),
    ("243f6a8885a308d313198a2e03707344", "a4093822299f31d0", "d16cfe0994fdcceb5001e42024126ea1"),
]


@pytest.mark.parametrize("counter, key, answer", PHILOX)
def test_philox_known_answers(counter, key, answer):
    counter, key, answer = (
        [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
        for digits in (counter, key, answer)
    )
    words = reference.philox([torch.tensor(c) for c in counter], tuple(map(torch.tensor, key)))
    assert [w.item() for w in words] == answer


def test_16_bit_inputs_are_computed_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        tensors = [x.detach().to(dtype) for x in inputs()]
        out, lse = reference.attention(*tensors)
        wide, wide_lse = reference.attention(*(x.float() for x in tensors))
        assert out.dtype == dtype
        assert torch.equal(out, wide.to(dtype))
        assert torch.equal(lse, wide_lse)
