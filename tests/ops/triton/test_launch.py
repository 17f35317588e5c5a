"""What a launch costs the CPU before the GPU hears of it: every argument that Triton looks at, and
every global that it compares."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from compile_only import redirect

from fastattn import ops
from fastattn.ops import triton
from fastattn.ops.triton import config

pytestmark = pytest.mark.skipif(
    triton.interpreting() or triton.load_failure() is not None, reason="needs Triton's compiler"
)

# An argument that is None costs the binder 0.1 us and the launcher nothing, a tensor 0.3 us and a
# question to the driver. What is left: operands, their strides, sizes, five scalars.
LIVE = {
    "attention_forward_kernel": 32,
    "attention_delta_kernel": 18,
    "attention_backward_queries_kernel": 34,
    "attention_backward_keys_kernel": 38,
    "attention_jvp_kernel": 42,
    "attention_second_queries_kernel": 48,
    "attention_second_keys_kernel": 51,
}
LIVE_OF_NORMS = {
    "norm_forward_kernel": 14,
    "norm_backward_kernel": 17,
    "norm_add_shares_kernel": 6,
}
# The forward and the backward of an activation, without dropout and with it.
LIVE_OF_ACTIVATIONS = [6, 8, 9, 11]
NAMED_GLOBALS = {"LOG2_E", "LN_2"}


@pytest.fixture
def launches(monkeypatch) -> list:
    """(kernel, its arguments by name) of every launch; nothing runs."""
    calls = []

    def launch(kernel, grid, *args, device, **options):
        names = dict(zip(kernel.arg_names, args, strict=False)) | options
        calls.append((kernel, {name: names[name] for name in kernel.arg_names}))

    redirect(monkeypatch.setattr, 90, launch)
    return calls


@pytest.fixture
def grids(monkeypatch) -> list:
    """The grid of every launch; nothing runs."""
    found = []
    redirect(monkeypatch.setattr, 90, lambda kernel, grid, *args, **options: found.append(grid))
    return found


def count(value: object) -> int:
    """How many of the value's parts are not None: those inside tuples one by one."""
    return sum(map(count, value)) if isinstance(value, tuple) else value is not None


def live(kernel, arguments: dict) -> int:
    """Arguments that are neither None nor compile-time."""
    constant = {kernel.arg_names[n] for n in kernel.constexprs}
    return sum(count(value) for name, value in arguments.items() if name not in constant)


def attend(mask: torch.Tensor | None = None, **tangents: torch.Tensor) -> None:
    """A causal forward and backward, or beside tangents a double backward."""
    from fastattn.ops.triton import attention, attention_second_order

    q, lse = torch.empty(2, 4, 256, 128, dtype=torch.bfloat16), torch.empty(2, 4, 256)
    more, given = ops.Options(True, 0.1), (q, q, q, mask, *ops.Extras())
    if tangents:
        directions = [tangents.get(name) for name in ("q", "k", "v", "mask")]
        attention_second_order.attention_double_backward(
            q, None, *given, *directions, q, lse, lse, *more, [True] * 4 + [False]
        )
        return
    attention.attention_forward(*given, *more)
    attention.attention_backward(q, None, *given, q, lse, lse, *more, [True] * 3 + [False])


def test_a_plain_launch_binds_few_arguments(launches):
    attend()
    attend(q=torch.empty(2, 4, 256, 128, dtype=torch.bfloat16))
    counts = {kernel.__name__: live(kernel, arguments) for kernel, arguments in launches}
    assert counts.keys() == LIVE.keys()
    over = {name: n for name, n in counts.items() if n > LIVE[name]}
    assert not over


def test_an_absent_option_is_none(launches):
    attend()
    optional = {
        "mask", "extras", "tokens_q", "tokens_k", "left", "seed_batch", "threshold", "p_grad_lse",
        "grad_lse_strides",
    }  # fmt: skip
    seen = set()
    for kernel, arguments in launches:
        there = {name for name in optional & arguments.keys() if count(arguments[name])}
        assert not there, kernel.__name__
        seen |= optional & arguments.keys()
    assert seen == optional


def test_a_mask_is_passed(launches):
    attend(torch.empty(1, 1, 256, 256, dtype=torch.bool))
    masked = [a["mask"] for kernel, a in launches if "mask" in a]
    assert len(masked) == 3
    for mask in masked:
        for name in ("p", "strides", "lists", "counts", "list_strides"):
            assert getattr(mask, name) is not None, name


def test_few_globals_are_compared(launches):
    """One costs 0.7 us a launch; the flags are attributes of a module for that."""
    attend()
    attend(q=torch.empty(2, 4, 256, 128, dtype=torch.bfloat16))
    normalise(0.1)
    activate(0.1)
    for kernel, _ in launches:
        assert kernel.cache_key  # which looks the globals up
        named = {name for name, _ in kernel.used_global_vals}
        assert named <= NAMED_GLOBALS, kernel.__name__


def normalise(dropout_p: float = 0.0, **vectors: torch.Tensor) -> None:
    """A forward and a backward, of RMSNorm where there is no weight."""
    from fastattn.ops.triton import norm

    x, seed = torch.empty(2, 256, 128, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int64)
    residual, weight, bias = (vectors.get(name) for name in ("residual", "weight", "bias"))
    rms = weight is None
    _, _, mean, rstd = norm.dropout_add_norm_forward(
        x, residual, weight, bias, seed, dropout_p, 1e-5, rms
    )
    norm.dropout_add_norm_backward(
        x, residual, x, weight, mean, rstd, seed, dropout_p, rms, [True] * 4
    )


def test_a_norm_binds_few_arguments(launches):
    w = torch.empty(128)
    normalise(residual=torch.empty(2, 256, 128, dtype=torch.bfloat16), weight=w, bias=w)
    counts = {kernel.__name__: live(kernel, arguments) for kernel, arguments in launches}
    assert counts.keys() == LIVE_OF_NORMS.keys()
    over = {name: n for name, n in counts.items() if n > LIVE_OF_NORMS[name]}
    assert not over


def test_what_a_norm_lacks_is_none(launches):
    normalise()
    optional = {
        "p_residual", "p_weight", "p_bias", "p_seed", "p_sum", "p_mean", "p_dsum", "seed_rows",
        "threshold", "stride_residual", "stride_dsum",
    }  # fmt: skip
    seen = set()
    for kernel, arguments in launches:
        there = {name for name in optional & arguments.keys() if count(arguments[name])}
        assert not there, kernel.__name__
        seen |= optional & arguments.keys()
    assert seen == optional


def test_sizes_make_no_new_norm_kernels(launches):
    """The rows, and what follows from them, are not looked at: one kernel serves every batch."""
    normalise(0.1)
    for kernel, arguments in launches:
        sizes = {"m", "share", "shares", "seed_rows", "threshold"} & arguments.keys()
        free = {p.name for p in kernel.params if p.do_not_specialize}
        assert sizes
        assert sizes <= free, kernel.__name__


def activate(dropout_p: float = 0.0, *shape: int) -> None:
    """A forward and a backward, of a GELU."""
    from fastattn.ops.triton import activation

    x = torch.empty(shape or (2, 256, 128), dtype=torch.bfloat16, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    activation.activation_forward(x, 2, dropout_p, seed)
    activation.activation_backward(x, x, 2, dropout_p, seed)


def test_an_activation_binds_few_arguments(launches):
    activate()
    activate(0.1)
    counts = [live(kernel, arguments) for kernel, arguments in launches]
    assert counts == LIVE_OF_ACTIVATIONS
    for _, arguments in launches[:2]:
        assert not any(count(arguments[name]) for name in ("p_seed", "seed_rows", "threshold"))


def test_sizes_make_no_new_activation_kernels(launches):
    activate(0.1)
    for kernel, _ in launches:
        free = {p.name for p in kernel.params if p.do_not_specialize}
        assert {"m", "seed_rows", "threshold"} <= free


@pytest.mark.parametrize("shape", [(40_000_000,), (2, 40_000_000), (3_000_000, 8)], ids=str)
def test_an_activation_of_any_size_has_a_grid(grids, shape):
    """A GPU starts at most 65535 programs along any dimension but the first."""
    activate(0.1, *shape)
    assert len(grids) == 2
    tile = config.ACTIVATION.rows * config.ACTIVATION.columns
    for grid in grids:
        assert math.prod(grid) * tile >= math.prod(shape)
        assert grid[0] < 2**31
        assert all(extent < 2**16 for extent in grid[1:])


def test_a_flag_keeps_its_number():
    """Triton's cache on disk holds kernels by FLAGS; what a number means may not change."""
    from fastattn.ops.triton.problem import FLAG

    single = (
        "WINDOW_LEFT", "WINDOW_RIGHT", "BOOL_MASK", "FLOAT_MASK", "SOFTCAP", "ALIBI", "DROPOUT",
        "NEGATIVE_SCALE", "VARLEN", "WIDE", "UPCAST", "TF32", "LSE_GRADIENT", "TMA", "T_QUERY",
        "T_KEY", "T_VALUE", "T_MASK", "SECOND_ORDER", "TF32X3",
    )  # fmt: skip
    assert [FLAG[name] for name in single] == [1 << n for n in range(len(single))]
    assert FLAG["MASKED"] == FLAG["BOOL_MASK"] | FLAG["FLOAT_MASK"]
    assert FLAG["WINDOWED"] == FLAG["WINDOW_LEFT"] | FLAG["WINDOW_RIGHT"]


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("pass", False),
        ("torch.set_float32_matmul_precision('high')", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False),
        ("torch.backends.fp32_precision = 'tf32'", True),
        ("torch.backends.fp32_precision = 'ieee'", False),
    ],
)
def test_tf32_is_allowed_by_any_of_torchs_settings(setting, allowed):
    """Beside the newer ones the older raises in some states: a process for each."""
    program = f"import torch; from fastattn.ops.triton import config; {setting}; "
    program += "print(config.tf32_allowed(), config.float32_products('forward', 90, 64))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(allowed), "tf32" if allowed else "tf32x3"], done.stderr
