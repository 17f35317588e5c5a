"""The kernels of linear layers with any activation and dropout, of several layers on one input and
of gated ones: values and gradients against float64, in units of torch's own error."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from layer_calls import ACTIVATIONS, DTYPES, SLOPED, TORCHS, check, draw, linear, seed_of_linear

import fastattn
from fastattn import reference
from fastattn.functional import LinearFunction

pytestmark = pytest.mark.native
# Torch's own formulas lose the digits of the tails.
EXACT = {
    "gelu": lambda z: z * torch.special.log_ndtr(z).exp(),
    "gelu_tanh": lambda z: z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows, n_out, n_in", [(3, 70, 40), (130, 96, 33), (1, 9, 7), (64, 8, 300)])
def test_it_is_torchs_layer_and_its_gradients(dtype, activation, rows, n_out, n_in):
    torch.manual_seed(rows)
    x, w, b = draw(rows, n_in), draw(n_out, n_in) / math.sqrt(n_in), draw(n_out)
    tensors = [t.to(dtype).requires_grad_() for t in (x, w, b)]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    out = linear(*tensors, activation)
    peer, oracle = (TORCHS[activation](F.linear(*ts)) for ts in (tensors, wide))
    check("out", out, oracle, peer)
    t = draw(rows, n_out).to(dtype)
    if activation in (
        "relu",
        "relu2",
    ):  # an output that is 0 but for rounding may be on either side
        t[(oracle - out).abs() * 2 > oracle.abs()] = 0
    found = torch.autograd.grad(out, tensors, t)
    peers = torch.autograd.grad(peer, tensors, t)
    oracles = torch.autograd.grad(oracle, wide, t.double())
    for name, *results in zip(("dx", "dw", "db"), found, oracles, peers, strict=True):
        check(name, *results)


@pytest.mark.parametrize("activation", SLOPED)
def test_far_from_zero(activation):
    """Value and slope where exponentials over- and underflow, and at what is not a number."""
    z = torch.tensor([-1e30, -200, -90, -30, -14, -13, -9, -5, -1e-30, -0.0, 0.0, 1e-30, 5, 9, 14,
                      90, 200, 1e15])[:, None]  # fmt: skip
    one = torch.ones(1, 1)
    out, slope = LinearFunction.apply(z, activation, 0.0, None, True, 1, one, None)
    wide = z.double().requires_grad_()
    expected = EXACT.get(activation, TORCHS[activation])(wide)
    (of_z,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(slope.double(), of_z.nan_to_num(0.0), rtol=2e-6, atol=1e-30)
    odd = torch.tensor([math.nan, math.inf, -math.inf])[:, None]
    out = fastattn.linear(odd, one, None, activation, backend="cpu")
    torch.testing.assert_close(out, TORCHS[activation](odd.double()).float(), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [2, 100])
def test_the_mask_is_the_references(dtype, activation, rows):
    x, w, b = (draw(*s).to(dtype) for s in ((rows, 24), (77, 24), (77,)))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    options = {"activation": activation, "dropout_p": 0.4, "seed": seed_of_linear()}
    out, expected = linear(*leaves, activation, 0.4), reference.linear(*wide, **options)
    peer = reference.linear(*leaves, **options)
    check("out", out, expected, peer)
    t = draw(rows, 77).to(dtype)
    found = torch.autograd.grad(out, leaves, t)
    peers = torch.autograd.grad(peer, leaves, t)
    oracles = torch.autograd.grad(expected, wide, t.double())
    for name, *results in zip(("dx", "dw", "db"), found, oracles, peers, strict=True):
        check(name, *results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 17, 150])
@pytest.mark.parametrize("widths", [(64, 64, 64), (5, 130, 16)])
def test_the_input_gradient_of_several_weights(dtype, rows, widths):
    """One product over the depths of all, padded where one is no whole unit. The peer is torch's
    product with all weights below each other, which is the same sum."""
    x = draw(rows, 56).to(dtype).requires_grad_()
    weights = [(draw(n, 56) / 8).to(dtype).requires_grad_() for n in widths]
    biases = [draw(n).to(dtype).requires_grad_() for n in widths]
    leaves = [x, *weights, *biases]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    outs = fastattn.multi_linear(x, weights, biases, backend="cpu")
    ts = [torch.randn_like(out) for out in outs]

    def gradients(leaves, outs):
        return torch.autograd.grad(
            outs, leaves, [t.to(outs[0].dtype) for t in ts], retain_graph=True
        )

    def theirs(x, w0, w1, w2, b0, b1, b2):
        whole = F.linear(x, torch.cat((w0, w1, w2)), torch.cat((b0, b1, b2)))
        return whole.split(widths, -1)

    peers, oracles = theirs(*leaves), theirs(*wide)
    for got in zip(outs, oracles, peers, strict=True):
        check("out", *got)
    for got in zip(gradients(leaves, outs), gradients(wide, oracles), gradients(leaves, peers),
                   strict=True):  # fmt: skip
        check("gradient", *got)
    only = torch.autograd.grad(outs[1].sum(), leaves, allow_unused=True)
    assert [g is not None for g in only] == [True, False, True, False, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows, n, k", [(2, 30, 64), (70, 130, 40), (130, 64, 24)])
def test_the_gated_product(dtype, activation, rows, n, k):
    shapes = ((rows, k), (n, k), (n, k), (n,), (n,))
    leaves = [(draw(*s) / (math.sqrt(k) if len(s) == 2 and s[0] == n else 1)).to(dtype)
              .requires_grad_() for s in shapes]  # fmt: skip
    wide = [t.detach().double().requires_grad_() for t in leaves]
    x, gate, up, b_gate, b_up = leaves
    out = fastattn.gated_mlp(x, gate, up, None, b_gate, b_up, activation=activation, backend="cpu")
    peer, oracle = (reference.gated_linear(*ts, activation=activation) for ts in (leaves, wide))
    check("out", out, oracle, peer)
    t = draw(rows, n).to(dtype)
    if activation in ("relu", "relu2"):
        z = F.linear(wide[0], wide[1], wide[3])
        t[z.abs() < 0.05] = 0  # the gate may be on either side
    found, peers = (torch.autograd.grad(o, leaves, t) for o in (out, peer))
    oracles = torch.autograd.grad(oracle, wide, t.double())
    for got in zip(found, oracles, peers, strict=True):
        check("gradient", *got)
