"""vmap of values and derivatives against loops: mapped dimensions, masks, slopes, dropout, linear
layers, per-sample gradients of modules."""

from __future__ import annotations

import pytest
import torch
from derivatives import CLOSE, attention, float64, looped, qkv  # noqa: F401
from torch.func import functional_call, grad, jvp, vjp, vmap

import fastattn

pytestmark = pytest.mark.native

NINE = (2, 1, 1, 2, 1, 1, 2)


def many() -> list[torch.Tensor]:
    """Three queries, three keys, three masks, three sets of slopes; the same at each call."""
    draws = torch.Generator().manual_seed(1)
    shapes = ((3, 2, 4, 3), (2, 3, 5, 3), (3, 4, 5), (3, 2))
    return [torch.randn(*shape, dtype=torch.float64, generator=draws) for shape in shapes]


def mapped(kind: str):
    """The function, where its inputs are mapped, its inputs, and how many of them are
    differentiated."""
    (q, k, v), (queries, keys, masks, slopes) = qkv(), many()
    if kind == "some":
        return attention(is_causal=True), (0, 1, None), (queries, keys, v), 3
    if kind == "masks":
        return attention(), (0, None, None, 0), (queries, k, v, masks), 4
    if kind == "a shared mask":
        return attention(), (0, None, None, None), (queries, k, v, masks[0]), 4
    if kind == "slopes":
        function = lambda q, k, v, s: attention(alibi_slopes=s)(q, k, v)  # noqa: E731
        return function, (None, 1, None, 0), (q, keys, v, slopes), 3
    assert kind == "9 dimensions"
    inputs = (
        queries.view(3, 1, 1, 1, 1, 1, 1, 2, 4, 3).expand(3, *NINE, 4, 3).clone(),
        k.expand(*NINE, 5, 3).clone(),
        v.expand(*NINE, 5, 3).clone(),
        masks,
    )
    return attention(), (0, None, None, 0), inputs, 4


@pytest.mark.parametrize("kind", ["some", "masks", "a shared mask", "slopes", "9 dimensions"])
def test_vmap_is_the_loop(kind):
    function, in_dims, inputs, count = mapped(kind)

    def gradients(*x):
        every = tuple(range(count))
        return grad(lambda *x: function(*x).pow(3).sum(), argnums=every)(*x)

    def second(*x):
        directions = tuple(y.cos() for y in x[:count])
        return jvp(lambda *y: gradients(*y, *x[count:]), x[:count], directions)[1]

    for f in (function, gradients, second):
        torch.testing.assert_close(vmap(f, in_dims)(*inputs), looped(f, in_dims, *inputs), **CLOSE)


def test_nested_vmap():
    (_, _, v), (queries, keys, *_) = qkv(), many()
    function = attention(window_size=(1, 2))
    mapped = vmap(vmap(function, (0, None, None)), (None, 1, None))(queries, keys, v)
    expected = torch.stack([looped(function, (0, None, None), queries, k, v)
                            for k in keys.unbind(1)])  # fmt: skip
    torch.testing.assert_close(mapped, expected, **CLOSE)


@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_vmap_of_dropout(randomness):
    (_, k, v), queries = qkv(), many()[0]

    def function(q):
        return attention(dropout_p=0.4)(q, k, v)

    torch.manual_seed(3)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(function)(queries)
        return
    same = queries[:1].expand(3, 2, 4, 3)
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
