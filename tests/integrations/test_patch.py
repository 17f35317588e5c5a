"""patch and unpatch: what is swapped, what is left alone and why, and that nothing else changes."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastattn
from fastattn import _products
from fastattn import nn as fnn
from fastattn.integrations.plan import ClassSwap

pytestmark = pytest.mark.native


def digits() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class Functional(nn.Module):
    """Linear, ReLU in a forward of its own, as a function, a method and a module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, 24), nn.Linear(24, 20), nn.Linear(20, 16)
        self.last, self.act = nn.Linear(16, 10), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x.flatten(1)))
        x = self.two(x).relu()
        return self.last(self.act(self.three(x)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.attention(x, x, x)[0]


MODELS = [
    (digits, {("Sequential", "fastattn FusedSequential"): 1}),
    (lambda: digits()[1:], {("Sequential", "fastattn FusedSequential"): 1}),
    (
        Encoder,
        {
            ("TransformerEncoder", "fastattn TransformerEncoder"): 1,
            ("TransformerEncoderLayer", "fastattn TransformerEncoderLayer"): 2,
            ("MultiheadAttention", "fastattn MultiheadAttention"): 3,
        },
    ),
]
IDS = ["sequential", "mlp", "encoder"]
models = pytest.mark.parametrize("make, counts", MODELS, ids=IDS)


def batch(make: object, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (5, 7, 64) if make is Encoder else (5, 64)
    return torch.randn(shape, dtype=dtype)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters()]


def reason(report: fastattn.PatchReport, name: str) -> str:
    (entry,) = [e for e in report.skipped if e.name == name]
    return entry.reason


# --- what is swapped ------------------------------------------------------------------------------


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
    report = fastattn.patch(model)
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


# --- plan, then apply -----------------------------------------------------------------------------


@models
def test_a_plan_changes_nothing(make, counts):
    model = make()
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    plan = fastattn.plan(model)
    dry = fastattn.patch(model, dry_run=True)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before
    assert str(plan) == str(dry)
    assert str(dry).startswith("fastattn (dry run): 1 ")
    assert dry.counts == counts
    applied = plan.apply()
    assert applied.entries == dry.entries
    assert str(applied).startswith("fastattn: 1 ")


def test_a_plan_that_is_out_of_date_is_refused_whole():
    model = nn.Sequential(digits(), digits())
    plan = fastattn.plan(model)
    model[1].__class__ = type("Block", (nn.Sequential,), {})
    with pytest.raises(RuntimeError, match="1: expected a Sequential, as planned, got Block"):
        plan.apply()
    assert type(model[0]) is nn.Sequential
    assert not fastattn.unpatch(model).entries


def test_an_exception_leaves_the_model_as_it_was(monkeypatch):
    model = Encoder()
    classes, attributes = zip(*((type(m), set(vars(m))) for m in model.modules()), strict=True)
    swap, done = ClassSwap.do, []

    def fails_at_the_third(self: ClassSwap) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(self)
        swap(self)

    monkeypatch.setattr(ClassSwap, "do", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        fastattn.patch(model)
    assert len(done) == 2
    assert [type(m) for m in model.modules()] == list(classes)
    assert [set(vars(m)) for m in model.modules()] == list(attributes)


def test_on_the_meta_device():
    """A class swap needs no data; what is on the meta device is served once it is not."""
    with torch.device("meta"):
        model = nn.Sequential(digits(), nn.TransformerEncoderLayer(10, 2, batch_first=True))
    assert len(fastattn.patch(model).swapped) == 3
    assert model(torch.empty(3, 5, 8, 8, device="meta").flatten(2)[:, 0]).shape == (3, 10)


# --- what is left alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "model", torch.randn(3), nn.Linear])
def test_not_a_module(model):
    for function in (fastattn.patch, fastattn.unpatch):
        with pytest.raises(TypeError, match="model: expected an nn.Module, got"):
            function(model)


def test_nothing_to_swap():
    for model in (nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4), nn.GELU()), nn.Conv2d(1, 1, 1)):
        first, *notes = str(fastattn.patch(model)).splitlines()
        assert first == "fastattn: nothing to swap"
        assert len(notes) == (not isinstance(model, nn.Conv2d))


def test_own_modules_are_left_alone():
    model = nn.ModuleList([fnn.MLP(4, 4, 4), fnn.LinearReLU(4, 4), fnn.MultiheadAttention(4, 2)])
    classes = [type(m) for m in model.modules()]
    assert not fastattn.patch(model).swapped
    assert not fastattn.unpatch(model).entries
    assert [type(m) for m in model.modules()] == classes


def hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda m, args, out: None)
    return linear


class MyLinear(nn.Linear):
    pass


REFUSED = {
    "hooks": (lambda: hooked(nn.Linear(64, 64)), "it has hooks"),
    "subclass": (lambda: MyLinear(64, 64), "subclass of Linear"),
    "lazy": (lambda: nn.LazyLinear(64), "lazy"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(64, 64)), "parametrized"),
    "dtype": (lambda: nn.Linear(64, 64, dtype=torch.complex64), "no kernel serves torch.complex64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_linear_that_must_stay(case):
    make, expected = REFUSED[case]
    linear = make()
    kind = type(linear)
    report = fastattn.patch(nn.Sequential(linear, nn.ReLU()))
    assert expected in reason(report, "0")
    assert not report.swapped
    assert type(linear) is kind
    assert expected in str(report)


def test_a_scripted_model_is_left_alone():
    scripted = torch.jit.script(digits())
    report = fastattn.patch(nn.Sequential(digits(), scripted))
    assert [e.name for e in report.swapped] == ["0"]
    assert "it is scripted: patch the model, then script it" in reason(report, "1")
    assert "it is scripted" in reason(fastattn.patch(scripted), "(root)")


def test_subclasses_of_attention_layers_stay():
    class Mine(nn.MultiheadAttention):
        pass

    class Layer(nn.TransformerEncoderLayer):
        pass

    layer = Layer(8, 2)
    layer.self_attn = Mine(8, 2)
    report = fastattn.patch(nn.ModuleList([layer]))
    assert "subclass of TransformerEncoderLayer" in reason(report, "0")
    assert "subclass of MultiheadAttention" in reason(report, "0.self_attn")
    assert not report.swapped


def test_a_shared_linear_keeps_its_own_meaning():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.net = nn.Sequential(self.fc, nn.ReLU(), nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.fc(x)) + torch.relu(self.net[2](x))

    model = Tied().double()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    report = fastattn.patch(model)
    assert {e.after for e in report.swapped} == {"fastattn FusedSequential"}
    assert type(model.fc) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_the_code_of_a_model_is_not_run():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("patch ran the model")

    model = nn.Sequential(Noisy(), digits())
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    assert fastattn.patch(model).swapped
    assert torch.equal(torch.rand(4), expected)


def test_the_children_of_a_sequential_keep_their_meaning():
    model = digits().double()
    x = torch.randn(3, 64, dtype=torch.float64)
    expected, hidden = model(x), model[:2](x)
    fastattn.patch(model)
    assert hidden.min() < 0
    torch.testing.assert_close(model[:2](x), hidden)
    torch.testing.assert_close(nn.Sequential(*list(model.children())[:2])(x), hidden)
    seen = []
    handle = model[1].register_forward_hook(lambda m, args, out: seen.append(out))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(seen[0], hidden)
    handle.remove()
    parametrizations.weight_norm(model[1])
    torch.testing.assert_close(model(x), expected)
    assert parametrize.is_parametrized(model[1])
    model[2] = nn.Tanh()
    torch.testing.assert_close(model(x), model[3](hidden.tanh()))


def test_a_sequential_subclass_stays():
    class Block(nn.Sequential):
        pass

    report = fastattn.patch(Block(nn.Linear(6, 6), nn.ReLU()))
    assert "subclass of Sequential" in reason(report, "0")


def test_unpatch_does_not_undo_others_changes():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    fastattn.patch(model)
    parametrizations.weight_norm(model[0], "in_proj_weight")
    report = fastattn.unpatch(model)
    assert "changed after patch" in reason(report, "0")
    parametrize.remove_parametrizations(model[0], "in_proj_weight")
    fastattn.unpatch(model)
    assert type(model[0]) is nn.MultiheadAttention


def test_unpatch_of_what_was_never_patched():
    report = fastattn.unpatch(digits())
    assert str(report) == "fastattn: nothing to undo: the model is not patched"


def test_no_native_library(monkeypatch):
    monkeypatch.setattr(fastattn.backends, "reasons", lambda p, b: ["it is not there"])
    report = fastattn.patch(nn.Sequential(*digits(), nn.MultiheadAttention(8, 2)))
    assert not report.swapped
    assert len(report.skipped) == 2
    assert all("cpu: it is not there" in e.reason for e in report.skipped)


# --- the report -----------------------------------------------------------------------------------


def test_report():
    model = nn.Sequential(hooked(nn.Linear(6, 6)), nn.ReLU(), nn.MultiheadAttention(6, 2))
    report = fastattn.patch(model)
    lines = str(report).splitlines()
    assert lines[0] == "fastattn: 1 MultiheadAttention -> fastattn MultiheadAttention; 1 left alone"
    assert lines[1].startswith("  2: MultiheadAttention -> fastattn MultiheadAttention: ")
    assert lines[2].startswith("  0: Linear left alone: it has hooks")
    assert len(report.swapped) == len(report.skipped) == 1
    console = Console(file=io.StringIO(), width=120)
    console.print(report)
    shown = console.file.getvalue()
    assert "(left alone)" in shown
    assert "MultiheadAttention" in shown


def test_a_compiled_model_is_patched_inside():
    model = torch.compile(digits(), backend="eager", fullgraph=True)
    x = torch.randn(3, 64)
    expected = model(x)
    assert fastattn.patch(model).swapped
    torch.testing.assert_close(model(x), expected)
