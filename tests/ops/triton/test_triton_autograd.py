"""Every mode of differentiation through the Triton kernels, in float64: numerical derivatives over
a few options, and transforms against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import fastattn

pytestmark = pytest.mark.triton

CASES = {
    "plain": {},
    "causal, float mask, softcap": {"is_causal": True, "mask": "float", "softcap": 0.7},
    "bool mask, dropout, window, alibi, LSE": {
        "mask": "bool",
        "dropout_p": 0.3,
        "window_size": (2, 1),
        "alibi_slopes": (0.5, 0.25),
        "return_lse": True,
    },
}


def attention(device, backend="triton", mask=None, alibi_slopes=None, **options):
    if alibi_slopes is not None:
        options["alibi_slopes"] = torch.tensor(alibi_slopes, device=device)

    def function(q, k, v, *masks):
        torch.manual_seed(7)
        result = fastattn.scaled_dot_product_attention(
            q, k, v, *masks, backend=backend, enable_gqa=True, **options
        )
        if "return_lse" not in options:
            return result
        return result[0], torch.where(result[1] == -math.inf, 0.0, result[1])

    return function


def inputs(device, requires_grad=False):
    return [
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=requires_grad)
        for shape in ((1, 2, 3, 2), (1, 1, 4, 2), (1, 1, 4, 3))
    ]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_first_and_second_derivatives(options, device):
    leaves = inputs(device, requires_grad=True)
    if options.get("mask") == "float":
        leaves.append(torch.randn(2, 3, 4, dtype=torch.float64, device=device).requires_grad_())
    if options.get("mask") == "bool":
        mask = torch.rand(2, 3, 4, device=device) > 0.3
        mask[:, 1] = False
        leaves.append(mask)
    function = attention(device, **options)
    gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)
    # To leave each second cotangent out takes as long again: test_absent_tangents does it too.
    gradgradcheck(
        function, leaves, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True,
        check_undefined_grad=not options,
    )  # fmt: skip


def test_transforms(device):
    q, k, v = inputs(device)
    many = torch.stack([q, 2 * q, q.sin()])

    def modes(backend):
        function = attention(device, backend, is_causal=True, alibi_slopes=(0.5, 0.25))

        def loss(q, k):
            return function(q, k, v).pow(3).sum()

        second = jvp(grad(loss, argnums=(0, 1)), (q, k), (q.cos(), k.sin()))[1]
        third = grad(lambda q: grad(lambda q: grad(loss)(q, k).sin().sum())(q).sin().sum())(q)
        mapped = vmap(grad(loss, argnums=(0, 1)), (0, None))(many, k)
        return *second, third, *mapped

    torch.testing.assert_close(modes("triton"), modes("reference"), rtol=1e-8, atol=1e-8)


def test_vmap_of_dropout(device):
    q, k, v = inputs(device)
    function = attention(device, dropout_p=0.4)
    same = q.expand(3, *q.shape)
    mapped = vmap(lambda q: function(q, k, v), randomness="same")(same)
    torch.testing.assert_close(mapped, function(q, k, v).expand(3, -1, -1, -1, -1))


def test_linear_layers(device):
    x, w, b = (
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((3, 5), (9, 5), (9,))
    )
    assert torch.nn.functional.linear(x, w, b).abs().min() > 1e-4
    for function in (
        lambda x, w, b: fastattn.linear_relu(x, w, b, backend="triton"),
        lambda x, w, b: fastattn.mlp(x, [w, w[:, :1].T], [b, None], backend="triton"),
    ):
        gradcheck(function, (x, w, b), fast_mode=True, check_forward_ad=True)
        gradgradcheck(
            function, (x, w, b), fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True
        )
