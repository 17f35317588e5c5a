"""Linear, LinearReLU and MLP against torch.nn's layers in fp64."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from torch import nn

import fastattn
from fastattn import _products, backends
from fastattn.functional import inference
from fastattn.nn import MLP, Linear, LinearReLU


def close(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Equal up to the rounding of fp64 sums; a NaN is a failure."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def stack(bias: bool = True, widths: tuple[int, ...] = (7, 33, 5, 3)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out, bias=bias, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def compare(ours: nn.Module, theirs: nn.Module, *shape: int) -> None:
    """Outputs and all gradients."""
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = ours(x), theirs(y)
    close(out, expected)
    grad = torch.randn_like(expected)
    out.backward(grad)
    expected.backward(grad)
    close(x.grad, y.grad)
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.grad, b.grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (0, 7)])
def test_linear_relu(bias, shape):
    torch.manual_seed(0)
    theirs = nn.Linear(7, 9, bias=bias, dtype=torch.float64)
    ours = LinearReLU(7, 9, bias=bias, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.Linear)
    x = torch.randn(*shape, dtype=torch.float64)
    close(ours(x), torch.relu(theirs(x)))


def test_linear_relu_gradients_and_initial_values():
    torch.manual_seed(0)
    theirs = nn.Linear(7, 9, dtype=torch.float64)
    torch.manual_seed(0)
    ours = LinearReLU(7, 9, dtype=torch.float64)
    assert torch.equal(ours.weight, theirs.weight)
    x = torch.randn(5, 7, dtype=torch.float64)
    grad = torch.randn(5, 9, dtype=torch.float64)
    ours(x).backward(grad)
    torch.relu(theirs(x)).backward(grad)
    close(ours.weight.grad, theirs.weight.grad)
    close(ours.bias.grad, theirs.bias.grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
def test_mlp(bias, shape):
    torch.manual_seed(0)
    theirs = stack(bias)
    ours = MLP(7, [33, 5], 3, bias=bias, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    compare(ours, theirs, *shape)
    stack(bias).load_state_dict(ours.state_dict(), strict=True)


def test_mlp_of_one_hidden_layer_and_of_none():
    assert [tuple(p.shape) for p in MLP(4, 8, 2).parameters()] == [(8, 4), (8,), (2, 8), (2,)]
    linear = MLP(4, [], 2)
    x = torch.randn(3, 4)
    assert torch.equal(linear(x), linear[0](x))


def test_mlp_is_one_node(monkeypatch):
    calls = []
    whole = fastattn.functional.mlp
    monkeypatch.setattr(
        fastattn.functional, "mlp", lambda *a, **k: calls.append(1) or whole(*a, **k)
    )
    MLP(4, [8, 8], 2)(torch.randn(3, 4))
    assert calls == [1]


def test_from_sequential_shares_parameters_and_names():
    layers = [nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)]
    theirs = nn.Sequential(OrderedDict(zip(("up", "act", "down"), layers, strict=True))).eval()
    ours = MLP.from_sequential(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not ours.training
    relu = nn.ReLU()  # one object in two places
    shared = nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
    assert list(MLP.from_sequential(shared).state_dict()) == list(shared.state_dict())
    torch.testing.assert_close(MLP.from_sequential(shared)(torch.ones(3)), shared(torch.ones(3)))


@pytest.mark.parametrize(
    "bad",
    [
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
        lambda: nn.Linear(3, 3),
    ],
)
def test_from_sequential_refuses(bad):
    with pytest.raises(ValueError, match=r"sequential: expected Linear, activation"):
        MLP.from_sequential(bad())


def test_mlp_behaves_as_a_sequential():
    mlp = MLP(4, [8, 6], 2)
    assert isinstance(mlp, nn.Sequential)
    assert len(mlp) == 5
    head = mlp[:2]
    assert type(head) is nn.Sequential
    x = torch.randn(3, 4)
    torch.testing.assert_close(mlp[2:](head(x)), mlp(x))


def test_a_hook_added_later_runs():
    mlp, seen = MLP(4, 8, 2), []
    x = torch.randn(3, 4)
    before = mlp(x)
    mlp[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(mlp(x), before)
    assert seen == [(3, 8), (3, 2)]


def test_deepcopy_is_independent():
    mlp = MLP(4, 8, 2)
    other = copy.deepcopy(mlp)
    x = torch.randn(3, 4)
    assert torch.equal(mlp(x), other(x))
    with torch.no_grad():
        other[0].weight.zero_()
    assert not torch.equal(mlp(x), other(x))


@pytest.mark.parametrize("make", [lambda: LinearReLU(4, 3), lambda: MLP(4, 8, 3)])
def test_bad_input(make):
    module = make()
    with pytest.raises(ValueError, match=r"weight.*in_features 5"):
        module(torch.randn(2, 5))
    with pytest.raises(TypeError, match=r"weight.*float64"):
        module(torch.randn(2, 4, dtype=torch.float64))
    with pytest.raises(
        TypeError, match=r"input: expected a floating-point tensor, got torch.int64"
    ):
        module(torch.ones(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("make", [lambda: LinearReLU(4, 3), lambda: MLP(4, 8, 3)])
def test_autocast(make):
    module = make()
    x = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    # A bf16 layer is within 2^-8 of its fp32 value, relative to the largest term of its sums.
    torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_compile_full_graph():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.mlp = LinearReLU(4, 6), MLP(6, 8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(self.up(x))

    module = Both()
    x = torch.randn(3, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    compiled(x).sum().backward()
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x).sum().backward()
    torch.testing.assert_close(grads, [p.grad for p in module.parameters()])


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """The rows of each product in the kernels, on a processor for which torch has no 16-bit one and
    a float32 one that is as fast."""
    rows: list[int] = []
    whole = fastattn.functional.mlp

    def spy(x: torch.Tensor, *layers: object) -> torch.Tensor:
        rows.append(x.numel() // x.shape[-1])
        return whole(x, *layers)

    monkeypatch.setattr(_products, "_LACKING", frozenset((torch.float16, torch.bfloat16)))
    monkeypatch.setattr(_products, "_ZEN4", False)
    monkeypatch.setattr(fastattn.functional, "mlp", spy)
    return rows


def compare_to_float64(ours: Linear, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Values and gradients beside torch's in float64."""
    theirs = nn.Linear(64, 48, bias=ours.bias is not None, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*rows, 64).to(dtype).to(ours.weight.dtype).requires_grad_()
    y = x.detach().double().requires_grad_()
    grad = torch.randn(*rows, 48).to(dtype)
    out, expected = ours(x), theirs(y)
    assert out.dtype == dtype
    out.backward(grad)
    expected.backward(grad.double())
    pairs = [(out, expected), (x.grad, y.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    unit = torch.finfo(dtype).eps  # one rounding of the result; sums are in float32
    for a, b in pairs:
        torch.testing.assert_close(
            a.double(), b, rtol=unit, atol=unit * float(b.detach().abs().max()) / 16
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_takes_the_kernels_where_torch_has_no_product(products, dtype, bias):
    compare_to_float64(Linear(64, 48, bias=bias, dtype=dtype), dtype, (16, 8))
    assert products == [128]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_autocast_decides(products, dtype):
    ours = Linear(64, 48)
    with torch.no_grad():  # what the 16-bit dtype holds
        for p in ours.parameters():
            p.copy_(p.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        compare_to_float64(ours, dtype, (16, 8))
    assert products == [128]
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    double = Linear(64, 48, dtype=torch.float64)
    with torch.autocast("cpu", dtype=dtype):  # float64 is left alone
        assert double(torch.randn(128, 64, dtype=torch.float64)).dtype == torch.float64
    assert products == [128]


def test_float32_takes_the_kernels_where_they_outrun_mkl(products, monkeypatch):
    ours, x = Linear(512, 384), torch.randn(100, 512)
    theirs = nn.Linear(512, 384)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))
    assert products == []
    monkeypatch.setattr(_products, "_ZEN4", True)
    torch.testing.assert_close(ours(x[:16]), theirs(x[:16]))
    torch.testing.assert_close(ours(x.repeat(4, 1)), theirs(x.repeat(4, 1)))
    for rows in (1, 100):
        assert torch.equal(ours(x[:rows]), theirs(x[:rows]))
    assert products == [16, 400]


def test_linear_is_torchs_elsewhere(products):
    torch.manual_seed(0)
    theirs, ours = nn.Linear(64, 48), Linear(64, 48)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(32, 64)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.half()(x[:2].half()), theirs.half()(x[:2].half()))
    assert products == []
    with pytest.raises(RuntimeError, match="same dtype"):
        ours(x)
    ours.float()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        ours(x[:, :8])
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="cannot"):
        ours(x[:, :8])
    assert products == []


def test_inference_honours_a_named_backend(monkeypatch):
    """The short way to the op is for calls that name no backend."""
    monkeypatch.setattr(_products, "_ZEN4", True)
    monkeypatch.setattr(_products, "LEAST_FEW", 0)
    layer, x = fastattn.nn.Linear(64, 64), torch.randn(4, 64)
    called = []
    monkeypatch.setattr(inference, "linear", lambda *given: called.append(given) or x)
    with torch.no_grad():
        layer(x)
        assert len(called) == 1
        monkeypatch.setattr(backends, "_default", "reference")
        layer(x)
        monkeypatch.setattr(backends, "_default", None)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
    layer(x)
    assert len(called) == 1
