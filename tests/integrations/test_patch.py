"""patch and unpatch: what is swapped, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_models import Functional, batch, digits, models, reason, step
from torch import Tensor, nn

import fastattn
from fastattn import _products

pytestmark = pytest.mark.native


@models
@pytest.mark.parametrize("training", [True, False])
def test_same_results_and_gradients(make, counts, training):
    torch.manual_seed(0)
    stock = make().double().train(training)
    ours = copy.deepcopy(stock)
    report = fastattn.patch(ours)
    assert report.counts == counts
    assert not report.skipped
    x = batch(make, torch.float64)
    out, grads = step(stock, x)
    our_out, our_grads = step(ours, x)
    torch.testing.assert_close(our_out, out, rtol=1e-12, atol=1e-12)
    for ours_g, stock_g in zip(our_grads, grads, strict=True):
        torch.testing.assert_close(ours_g, stock_g, rtol=1e-10, atol=1e-12)


@models
def test_only_classes_change(make, counts):
    model = make().eval()
    seen = []
    for module in model.modules():
        module.tag = object()
    model.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    model.register_forward_hook(lambda m, args, out: seen.append("post"))
    model.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    next(model.parameters()).requires_grad_(False)
    keys = list(model.state_dict())
    parameters = list(model.parameters())
    before = [dict(vars(m).items()) for m in model.modules()]
    order = list(model.modules())
    fastattn.patch(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.modules(), order, strict=True))
    for module, attributes in zip(model.modules(), before, strict=True):
        now = {k: v for k, v in vars(module).items() if not k.startswith("_fastattn")}
        assert now.keys() == attributes.keys()
        assert all(now[k] is attributes[k] for k in now)
    model(batch(make).requires_grad_()).sum().backward()
    assert seen == ["pre", "post", "backward"]


@models
def test_unpatch_restores_bitwise(make, counts):
    torch.manual_seed(0)
    model, x = make(), batch(make)
    classes = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    out, grads = step(model, x)
    fastattn.patch(model)
    step(model, x)
    report = fastattn.unpatch(model)
    assert report.counts == {(after, before): n for (before, after), n in counts.items()}
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    again, grads_again = step(model, x)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert not fastattn.unpatch(model).entries


@models
def test_patch_twice(make, counts):
    model = make()
    first = fastattn.patch(model)
    second = fastattn.patch(model)
    assert not second.swapped
    assert {e.name for e in second.skipped} == {e.name for e in first.swapped}
    assert all(e.reason == "already patched" for e in second.skipped)
    assert "already patched" in str(second)
    assert fastattn.unpatch(model).counts == {(b, a): n for (a, b), n in counts.items()}


@models
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_patched_model(make, counts, duplicate):
    model, x = make(), batch(make)
    fastattn.patch(model)
    twin = duplicate(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(twin(x), model(x))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    fastattn.unpatch(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in make().modules()]
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)


@models
def test_state_dict_exchange(make, counts):
    stock, ours = make(), make()
    fastattn.patch(ours)
    ours.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(ours.state_dict(), strict=True)
    x = batch(make)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("make", [digits, lambda: digits()[1:]])
def test_an_optimizer_goes_on(make, kind):
    torch.manual_seed(0)
    stock = make().double()
    ours = copy.deepcopy(stock)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizers = [kind(m.parameters(), lr=1e-3, **options) for m in (stock, ours)]
    for i in range(6):
        if i == 3:
            assert fastattn.patch(ours).swapped
        x = torch.randn(8, 64, dtype=torch.float64)
        for model, optimizer in zip((stock, ours), optimizers, strict=True):
            step(model, x)
            optimizer.step()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_swapped_layers_run_in_kernels(monkeypatch):
    calls = []
    for name in ("linear_relu", "mlp"):
        function = getattr(fastattn.functional, name)
        monkeypatch.setattr(
            fastattn.functional, name, lambda *a, f=function, n=name: (calls.append(n), f(*a))[1]
        )
    model = nn.Sequential(*digits(), nn.Dropout(0.1), nn.Linear(10, 5), nn.ReLU(inplace=True))
    fastattn.patch(model)
    model(torch.randn(3, 64)).sum().backward()
    assert calls == ["mlp", "linear_relu"]


def test_linears_of_other_forwards_are_left_apart():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Functional() for _ in range(2))
            self.head = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([block(x) for block in self.blocks], 1))

    model = Net().eval()
    x = torch.randn(4, 64)
    expected, linear = model(x), model.blocks[0].one(x)
    report = fastattn.patch(model, dropout=False)
    assert report.counts == {("Sequential", "fastattn FusedSequential"): 1}
    assert "only that code knows what else reads" in reason(report, "blocks.0 (and 1 more)")
    assert len(report.skipped) == 1
    assert type(model.blocks[0].one) is nn.Linear
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model.blocks[0].one(x), linear)


def test_linears_in_a_dtype_that_torch_has_no_product_for(monkeypatch):
    monkeypatch.setattr(_products, "_LACKING", frozenset((torch.float16,)))
    model = nn.Sequential(digits(), nn.Linear(10, 40), nn.GELU()).half()
    assert fastattn.patch(copy.deepcopy(model).float()).counts["Linear", "fastattn Linear"] == 0
    stock, x = copy.deepcopy(model), torch.randn(32, 8, 8, dtype=torch.float16)
    report = fastattn.patch(model)
    assert report.counts["Linear", "fastattn Linear"] == 1  # the others have 10 features
    assert "torch has no product in torch.float16" in str(report)
    calls = []
    for name in ("mlp", "linear_relu"):
        function = getattr(fastattn.functional, name)
        monkeypatch.setattr(
            fastattn.functional, name, lambda *a, f=function, n=name: (calls.append(n), f(*a))[1]
        )
    torch.testing.assert_close(model(x), stock(x), rtol=2e-3, atol=2e-3)
    assert calls == ["mlp"]  # the Sequential as a whole; 10 columns are torch's
    model[1].register_forward_hook(lambda m, args, out: out + 1)
    torch.testing.assert_close(model(x), F.gelu(stock[:2](x) + 1), rtol=2e-3, atol=2e-3)
    fastattn.unpatch(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 384), nn.GELU(), nn.Linear(384, 512), nn.GELU())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_linear_follows_autocast(monkeypatch, dtype):
    monkeypatch.setattr(_products, "_LACKING", frozenset({dtype}))
    monkeypatch.setattr(_products, "_ZEN4", False)
    model = wide()
    stock, x = copy.deepcopy(model), torch.randn(16, 512)
    report = fastattn.patch(model)
    assert report.counts == {("Linear", "fastattn Linear"): 2}
    assert f"torch has no product in {dtype} for this processor, which autocast" in str(report)
    assert torch.equal(model(x), stock(x))
    calls, function = [], fastattn.functional.mlp
    monkeypatch.setattr(fastattn.functional, "mlp", lambda *a: calls.append(1) or function(*a))
    for m in (model, stock):
        with torch.autocast("cpu", dtype=dtype):
            loss = m(x).float().square().mean()
        loss.backward()
    assert len(calls) == 2
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        scale = float(b.grad.abs().max())
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


def test_one_line_for_all_linears_that_keep_torchs_product(monkeypatch):
    monkeypatch.setattr(_products, "_LACKING", frozenset())
    monkeypatch.setattr(_products, "_ZEN4", False)
    model = nn.ModuleList([wide(), wide(), nn.Linear(4, 4), wide().double(), digits()])
    for report in (fastattn.plan(model), fastattn.patch(model, dry_run=True)):
        lines = [line for line in str(report).splitlines() if "torch's own product" in line]
        assert [line.split(":")[0] for line in lines] == [
            "  4 Linear left to torch's own product",
            "  1 Linear left to torch's own product",
            "  2 Linear left to torch's own product",
        ]
        assert "as fast in torch.float32" in lines[0]
        assert "less than 131072 elements" in lines[1]
        assert "as fast in torch.float64" in lines[2]
        report = getattr(report, "report", report)
        assert len(report.entries) == 1  # digits: its Linears are the Sequential's
    monkeypatch.setattr(_products, "_ZEN4", True)
    assert fastattn.patch(model).counts["Linear", "fastattn Linear"] == 4
