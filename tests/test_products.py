"""Which Linears take the kernels, as backends.explain tells it, on processors of several kinds."""

from __future__ import annotations

import pytest
import torch

from fastattn import _products, backends

pytestmark = pytest.mark.native
EPILOGUE_WINS = _products.epilogue_wins  # which conftest.py replaces

# rows, in, out -> who multiplies, on a processor for which torch lacks both 16-bit products (AVX2)
# and on one for which it lacks float16's alone and MKL is slower (Zen 4).
CASES = [
    (torch.float32, 512, 384, 1536, "torch", "cpu"),
    (torch.float32, 4, 384, 384, "torch", "torch"),
    (torch.float32, 4, 384, 1536, "torch", "cpu"),
    (torch.float32, 64, 384, 1536, "torch", "torch"),
    (torch.float32, 1, 3072, 3072, "torch", "torch"),
    (torch.float64, 512, 384, 1536, "torch", "torch"),
    (torch.bfloat16, 1, 384, 1536, "cpu", "cpu"),
    (torch.bfloat16, 512, 384, 1536, "cpu", "torch"),
    (torch.bfloat16, 1, 64, 64, "torch", "torch"),
    (torch.float16, 1, 384, 1536, "cpu", "cpu"),
    (torch.float16, 1, 384, 384, "torch", "torch"),
    (torch.float16, 512, 384, 1536, "cpu", "cpu"),
    (torch.float16, 512, 384, 8, "torch", "torch"),
    (torch.float16, 0, 384, 384, "torch", "torch"),
]


def processor(monkeypatch, zen4: bool) -> None:
    lacking = {torch.float16} if zen4 else {torch.float16, torch.bfloat16}
    monkeypatch.setattr(_products, "_LACKING", frozenset(lacking))
    monkeypatch.setattr(_products, "_ZEN4", zen4)


@pytest.mark.parametrize("zen4", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_explain(monkeypatch, case, zen4):
    processor(monkeypatch, zen4)
    dtype, rows, n_in, n_out, *expected = case
    input, weight = torch.empty(1, rows, n_in, dtype=dtype), torch.empty(n_out, n_in, dtype=dtype)
    found = backends.explain("linear", input, weight)
    assert found.backend == expected[zen4]
    assert found.detail
    if found.backend == "torch":
        assert found.reasons["cpu"] == [found.detail]
        assert f"linear: torch ({found.detail})" in str(found)
    else:
        assert found.reasons["cpu"] == []
    # A call that the first look leaves to torch is left to it by the rule as well.
    work = input.numel() * n_out
    assert work >= _products.least_work(dtype) or found.backend == "torch"


def test_explain_sees_autocast(monkeypatch):
    processor(monkeypatch, zen4=False)
    x, w = torch.empty(512, 384), torch.empty(1536, 384)
    assert backends.explain("linear", x, w).backend == "torch"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = backends.explain("linear", x, w)
        assert backends.explain("linear", x.double(), w.double()).backend == "torch"
    assert found.backend == "cpu"
    assert "no product in torch.bfloat16" in found.detail


def test_explain_on_other_devices_and_bad_arguments(monkeypatch):
    x, w = (torch.empty(n, 384, dtype=torch.float16, device="meta") for n in (512, 1536))
    found = backends.explain("linear", x, w)
    assert (found.backend, found.reasons["cpu"]) == ("torch", ["the inputs are on meta"])
    for args in ((x,), (x, x[0]), (x[0, 0], w)):
        with pytest.raises(TypeError, match="expected input"):
            backends.explain("linear", *args)


def test_what_is_swapped_may_win_and_what_is_left_says_why(monkeypatch):
    cpu = torch.device("cpu")
    for zen4 in (False, True):
        processor(monkeypatch, zen4)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for shape in ((64, 64), (384, 384), (8, 384), (384, 8), (768, 3072)):
                why = _products.why_swap(*shape, dtype, cpu)
                rows = (1, 4, 64, 4096)
                taken = [not _products.why_torchs(n, *shape, dtype, cpu) for n in rows]
                if why is None:
                    small = dtype == torch.float32 and shape == (64, 64)
                    assert small or not any(taken)
                    assert _products.why_left(*shape, dtype, cpu)
                elif "autocast" not in why:
                    assert any(taken)


@pytest.mark.parametrize("rows", [16, 64, 512])
def test_zen_5_multiplies_smaller_problems(monkeypatch, rows):
    """MKL keeps to AVX2 there, whatever the number of rows."""
    processor(monkeypatch, zen4=True)
    monkeypatch.setattr(_products, "_ZEN5", True)
    input, weight = torch.empty(rows, 384), torch.empty(384, 384)
    assert backends.explain("linear", input, weight).backend == "cpu"
    small = torch.empty((1 << 21) // (64 * 64) - 1, 64), torch.empty(64, 64)
    assert backends.explain("linear", *small).backend == "torch"
    assert _products.work_shift(torch.float32) > _products.work_shift(torch.bfloat16) == 0


CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "relu2", "quick_gelu"])
def test_gelu_and_silu_stay_behind_a_product_of_intels(monkeypatch, dtype, activation):
    processor(monkeypatch, zen4=False)
    assert EPILOGUE_WINS(dtype, activation, CPU)
    monkeypatch.setattr(_products, "_INTEL", True)
    monkeypatch.setattr(_products, "_LACKING", frozenset({torch.float16}))
    torchs = dtype in (torch.float32, torch.bfloat16) and activation in ("gelu", "silu")
    assert EPILOGUE_WINS(dtype, activation, CPU) == (not torchs)
    assert EPILOGUE_WINS(dtype, activation, torch.device("cuda"))
