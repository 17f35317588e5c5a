"""vmap of values and derivatives against loops: mapped dimensions, masks, slopes, dropout, linear
layers, per-sample gradients of modules."""

from __future__ import annotations

import pytest
import torch
from derivatives import CLOSE, K, Q, V, attention, float64, looped  # noqa: F401
from torch.func import functional_call, grad, jvp, vjp, vmap

import fastattn

pytestmark = pytest.mark.native

MANY_Q, MANY_K, MANY_MASKS, SLOPES = (
    torch.randn(*shape, dtype=torch.float64)
    for shape in ((3, 2, 4, 3), (2, 3, 5, 3), (3, 4, 5), (3, 2))
)
NINE = (2, 1, 1, 2, 1, 1, 2)
# The function, where its inputs are mapped, its inputs, and how many of them are differentiated.
MAPS = {
    "some": (attention(is_causal=True), (0, 1, None), (MANY_Q, MANY_K, V), 3),
    "masks": (attention(), (0, None, None, 0), (MANY_Q, K, V, MANY_MASKS), 4),
    "a shared mask": (attention(), (0, None, None, None), (MANY_Q, K, V, MANY_MASKS[0]), 4),
    "slopes": (
        lambda q, k, v, s: attention(alibi_slopes=s)(q, k, v),
        (None, 1, None, 0),
        (Q, MANY_K, V, SLOPES),
        3,
    ),
    "9 dimensions": (
        attention(),
        (0, None, None, 0),
        (
            MANY_Q.view(3, 1, 1, 1, 1, 1, 1, 2, 4, 3).expand(3, *NINE, 4, 3).clone(),
            K.expand(*NINE, 5, 3).clone(),
            V.expand(*NINE, 5, 3).clone(),
            MANY_MASKS,
        ),
        4,
    ),
}


@pytest.mark.parametrize("function, in_dims, inputs, count", MAPS.values(), ids=MAPS)
def test_vmap_is_the_loop(function, in_dims, inputs, count):
    def gradients(*x):
        every = tuple(range(count))
        return grad(lambda *x: function(*x).pow(3).sum(), argnums=every)(*x)

    def second(*x):
        directions = tuple(y.cos() for y in x[:count])
        return jvp(lambda *y: gradients(*y, *x[count:]), x[:count], directions)[1]

    for f in (function, gradients, second):
        torch.testing.assert_close(vmap(f, in_dims)(*inputs), looped(f, in_dims, *inputs), **CLOSE)


def test_nested_vmap():
    function = attention(window_size=(1, 2))
    mapped = vmap(vmap(function, (0, None, None)), (None, 1, None))(MANY_Q, MANY_K, V)
    expected = torch.stack([looped(function, (0, None, None), MANY_Q, k, V)
                            for k in MANY_K.unbind(1)])  # fmt: skip
    torch.testing.assert_close(mapped, expected, **CLOSE)


@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_vmap_of_dropout(randomness):
    def function(q):
        return attention(dropout_p=0.4)(q, K, V)

    torch.manual_seed(3)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(function)(MANY_Q)
        return
    same = MANY_Q[:1].expand(3, 2, 4, 3)
    mapped = vmap(function, randomness=randomness)(same)
    torch.manual_seed(3)
    assert torch.equal(mapped[0], mapped[1]) == (randomness == "same")
    if randomness == "same":
        torch.testing.assert_close(mapped[2], function(same[0]), **CLOSE)
    _, pullback = vjp(lambda q: vmap(function, randomness=randomness)(q), same)
    assert pullback(mapped)[0].shape == same.shape


@pytest.mark.parametrize("mapped", ["x", "w", "b", "xw", "xwb"])
def test_vmap_of_linear_relu(mapped):
    x, w, b = torch.randn(4, 3, 5), torch.randn(4, 9, 5), torch.randn(4, 9)
    in_dims = tuple(0 if name in mapped else None for name in "xwb")
    inputs = [t if d == 0 else t[0] for t, d in zip((x, w, b), in_dims, strict=True)]

    def second(*x):
        def gradients(*x):
            return grad(lambda *x: fastattn.linear_relu(*x).pow(3).sum(), argnums=(0, 1, 2))(*x)

        return jvp(gradients, x, tuple(y.cos() for y in x))

    def flat(*x):
        return tuple(y for pair in second(*x) for y in pair)

    torch.testing.assert_close(
        vmap(flat, in_dims)(*inputs), looped(flat, in_dims, *inputs), **CLOSE
    )


@pytest.mark.parametrize("kind", ["encoder layer", "attention", "mlp", "linear"])
def test_per_sample_gradients_of_modules(kind):
    model = {
        "encoder layer": lambda: fastattn.nn.TransformerEncoderLayer(
            8, 2, 16, 0.0, batch_first=True
        ),
        "attention": lambda: fastattn.nn.MultiheadAttention(8, 2, batch_first=True),
        "mlp": lambda: fastattn.nn.MLP(8, 6, 4),
        "linear": lambda: fastattn.nn.LinearReLU(8, 6),
    }[kind]()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x = torch.randn(5, 7, 8)

    def loss(parameters, x):
        x = x[None]
        out = functional_call(model, parameters, (x, x, x) if kind == "attention" else (x,))
        return (out[0] if kind == "attention" else out).square().sum()

    mapped = vmap(grad(loss), (None, 0))(parameters, x)
    for n in range(len(x)):
        expected = grad(loss)(parameters, x[n])
        torch.testing.assert_close({k: g[n] for k, g in mapped.items()}, expected, **CLOSE)
