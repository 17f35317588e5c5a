"""Every configuration of the Triton kernels compiled for GPUs that need not be here: shared memory
within the limit, no spills in the tuned tiles, Hopper's matrix instructions."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from compile_only import Driver, redirect
from pairs import every_pair

from fastattn import ops
from fastattn.ops import triton
from fastattn.ops.triton import config

pytestmark = pytest.mark.skipif(
    triton.interpreting() or triton.load_failure() is not None, reason="needs Triton's compiler"
)

ARCHITECTURES = (80, 90, 100)
# sm_86 and sm_89 take sm_80's tiles, which must therefore fit into less than sm_80 has. One test
# compiles for sm_86 itself.
SHARED_BYTES = {80: 99 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_BYTES_OF_SM_80_ALONE = 163 << 10
# The tiles are tuned for Triton 3.6; 3.9's assembler keeps six registers elsewhere on sm_90.
SPILLS = 0 if importlib.metadata.version("triton").startswith("3.6.") else 24
# float32 on tensor cores: what a program keeps, in both parts, by head dim.
TF32_SPILLS = {64: 80, 128: 700, 256: 800}
HEAD_DIMS, MASKS = (64, 128, 256), ("none", "bool", "float")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Compiled(NamedTuple):
    kernel: str
    shared: int
    stack: int  # bytes a thread, of spilled registers
    registers: int  # a handful where the assembler gave up: beyond tensor memory
    ptx: str


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Makes launches compile for the architecture that it is called with; returns what they do."""
    import triton as compiler_package
    from triton.runtime import driver

    fake, compiled = Driver(), []
    cuobjdump = Path(compiler_package.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def launch(kernel, grid, *args, device, **options):
        built = kernel.warmup(*args, grid=grid, **options)
        cubin = tmp_path / f"{len(compiled)}.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = subprocess.run(
            [str(cuobjdump), "-res-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        stack, registers = (int(re.search(rf"{n}:(\d+)", usage)[1]) for n in ("STACK", "REG"))
        ptx = built.asm["ptx"]
        compiled.append(Compiled(kernel.__name__, built.metadata.shared, stack, registers, ptx))

    def set_architecture(architecture: int) -> list[Compiled]:
        fake.architecture = architecture
        redirect(monkeypatch.setattr, architecture, launch)
        compiled.clear()
        return compiled

    driver.set_active(fake)
    yield set_architecture
    if torch.cuda.is_available():
        driver.reset_active()


def attend(dtype, head_dim, mask=None, order=1, **options) -> None:
    """A forward and a backward, or a double backward, with everything asked for; nothing runs."""
    from fastattn.ops.triton import attention, attention_second_order

    q = torch.empty(1, 4, 256, head_dim, dtype=dtype)
    k = torch.empty(1, options.pop("heads_k", 4), 256, head_dim, dtype=dtype)
    seed, slopes = torch.zeros(1, dtype=torch.int64), options.pop("slopes", None)
    p, causal = options.pop("dropout_p", 0.0), options.pop("is_causal", False)
    window, softcap = options.pop("window", (-1, -1)), options.pop("softcap", 0.0)
    more = ops.Options(causal, 0.1, p, *window, softcap)
    given = (q, k, k, mask, *ops.Extras(slopes, seed))
    bias = None if mask is None or mask.dtype == torch.bool else mask
    needs = [True] * (order + 2) + [bias is not None]
    if order == 2:
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=_wide(dtype))
        attention_second_order.attention_double_backward(
            out, lse, *given, q, k, k, bias, out, lse, lse, *more, needs
        )
        return
    out, lse, *softmax = attention.attention_forward(*given, *more)
    attention.attention_backward(out, lse, *given, out, *softmax, *more, needs)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize(
    "architecture, dtype, head_dim", every_pair(ARCHITECTURES, DTYPES, HEAD_DIMS)
)
def test_attention(architecture, dtype, head_dim, compiler):
    compiled = compiler(architecture)
    attend(DTYPES[dtype], head_dim, is_causal=True)
    check_attention(compiled, architecture, dtype, head_dim)
    if dtype == "fp32":
        check_float32(compiled, architecture, head_dim)
    tma = dtype == "bf16" and architecture >= 90 and head_dim <= 128
    loads = {k.kernel for k in compiled if "cp.async.bulk.tensor" in k.ptx}
    assert len(loads) == (3 if tma else 0)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("architecture", [90, 100])
def test_attention_without_tensor_descriptors(architecture, head_dim, compiler, monkeypatch):
    from fastattn.ops.triton import problem

    monkeypatch.setattr(problem, "_tma_can_load", lambda _: False)
    compiled = compiler(architecture)
    attend(torch.bfloat16, head_dim, is_causal=True)
    check_attention(compiled, architecture, "bf16", head_dim)


def shared_bytes(architecture: int, dtype: str, head_dim: int) -> int:
    if architecture == 80 and config.unsupported(86, DTYPES[dtype].itemsize, head_dim):
        return SHARED_BYTES_OF_SM_80_ALONE
    return SHARED_BYTES[architecture]


def check_attention(compiled: list[Compiled], architecture: int, dtype: str, head_dim: int) -> None:
    assert len(compiled) == 4
    for kernel in compiled:
        assert kernel.shared <= shared_bytes(architecture, dtype, head_dim), kernel[:3]
        if dtype == "bf16" and head_dim <= 128:
            assert kernel.stack <= SPILLS, kernel[:3]
        if dtype == "bf16" and architecture == 90 and "delta" not in kernel.kernel:
            assert "wgmma.mma_async" in kernel.ptx, kernel.kernel


# kernel -> its name in the table of tiles
NAMES = {
    "attention_forward_kernel": "forward",
    "attention_backward_keys_kernel": "keys",
    "attention_backward_queries_kernel": "queries",
    "attention_jvp_kernel": "jvp",
    "attention_second_keys_kernel": "second_keys",
    "attention_second_queries_kernel": "second_queries",
}
MATRIX_INSTRUCTIONS = {
    80: r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32",
    90: r"(wgmma\.mma_async\.sync\.aligned|mma\.sync\.aligned)\.\w+(\.row\.col)?\.f32\.tf32\.tf32",
    100: r"tcgen05\.mma\S*kind::tf32",
}


def check_float32(compiled: list[Compiled], architecture: int, head_dim: int) -> set[str]:
    """float32 is multiplied on tensor cores where the table says so, and nowhere else. Returns the
    kernels that do."""
    tf32 = set()
    pattern = MATRIX_INSTRUCTIONS[architecture]
    for kernel in compiled:
        name = NAMES.get(kernel.kernel)
        if name is None:
            continue
        if config.float32_products(name, architecture, head_dim) == "ieee":
            assert "tf32" not in kernel.ptx, kernel[:4]
            continue
        tf32.add(name)
        assert len(re.findall(pattern, kernel.ptx)) >= 3, kernel[:4]  # three for each product
        assert "cvt.rna.tf32" in kernel.ptx, kernel[:4]
        assert kernel.stack <= TF32_SPILLS[head_dim], kernel[:4]
        assert kernel.registers >= 16, kernel[:4]
    return tf32


@pytest.mark.parametrize("architecture", [80, 90])
def test_float32_runs_on_tensor_cores(architecture, compiler):
    """With the default setting, at the head dims that matter."""
    for head_dim in (64, 128):
        compiled = compiler(architecture)
        attend(torch.float32, head_dim)
        assert check_float32(compiled, architecture, head_dim) == {"forward", "keys", "queries"}


def test_float32_products_by_setting(compiler, monkeypatch):
    """IEEE by FASTATTN_FLOAT32_PRODUCTS; one product of rounded operands where torch allows it."""
    compiled = compiler(90)
    monkeypatch.setattr(config, "FLOAT32_PRODUCTS", "ieee")
    attend(torch.float32, 64)
    assert len(compiled) == 4
    assert not any("tf32" in kernel.ptx for kernel in compiled)
    monkeypatch.undo()
    compiled = compiler(90)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    attend(torch.float32, 64)
    assert all("wgmma" in k.ptx and "cvt.rna" not in k.ptx for k in compiled if k.kernel in NAMES)


def test_an_unknown_setting_is_refused():
    environment = {**os.environ, "FASTATTN_FLOAT32_PRODUCTS": "fp32"}
    command = [sys.executable, "-c", "import fastattn.ops.triton.config"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "expected tf32x3 or ieee, got 'fp32'" in run.stderr


# Masked tiles of these spill a little, full ones do not.
MASKED_TILES_SPILL = {
    (90, 64, "attention_second_keys_kernel"): 8,
    (90, 128, "attention_second_keys_kernel"): 64,
}


@pytest.mark.parametrize(
    "architecture, dtype, head_dim, mask",
    every_pair(ARCHITECTURES, DTYPES, HEAD_DIMS, [False, True]),
)
def test_second_order(architecture, dtype, head_dim, mask, compiler):
    compiled = compiler(architecture)
    bias = torch.empty(1, 4, 256, 256, dtype=DTYPES[dtype]) if mask else None
    attend(DTYPES[dtype], head_dim, bias, order=2, is_causal=not mask)
    names = {kernel.kernel for kernel in compiled}
    assert names >= {
        "attention_jvp_kernel", "attention_second_keys_kernel", "attention_second_queries_kernel",
    }  # fmt: skip
    assert ("attention_mask_gradient_kernel" in names) == mask
    for kernel in compiled:
        assert kernel.shared <= shared_bytes(architecture, dtype, head_dim), kernel[:4]
        assert kernel.registers >= 16, kernel[:4]
        attention = "second" in kernel.kernel or "jvp" in kernel.kernel
        if dtype == "bf16" and head_dim <= 128 and not mask:
            allowed = MASKED_TILES_SPILL.get((architecture, head_dim, kernel.kernel), 0)
            assert kernel.stack <= SPILLS + allowed, kernel[:4]
        if dtype == "bf16" and architecture == 90 and attention:
            assert "wgmma.mma_async" in kernel.ptx, kernel.kernel
    if dtype == "fp32" and not mask:
        tf32 = check_float32(compiled, architecture, head_dim)
        assert bool(tf32) == (architecture == 90 and head_dim <= 128)
    loads = {k.kernel for k in compiled if "cp.async.bulk.tensor" in k.ptx}
    tma = dtype == "bf16" and architecture >= 90 and head_dim <= 128
    assert loads == ({"attention_jvp_kernel"} if tma else set())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("architecture", [90, 100])
def test_second_order_without_tensor_descriptors(architecture, head_dim, compiler, monkeypatch):
    from fastattn.ops.triton import problem

    monkeypatch.setattr(problem, "_tma_can_load", lambda _: False)
    compiled = compiler(architecture)
    attend(torch.bfloat16, head_dim, order=2, is_causal=True)
    (jvp,) = (kernel for kernel in compiled if "jvp" in kernel.kernel)
    assert jvp.stack <= SPILLS
    assert jvp.shared <= SHARED_BYTES[architecture]
    assert jvp.registers >= 16


@pytest.mark.parametrize(
    "architecture, head_dim, mask", every_pair(ARCHITECTURES, HEAD_DIMS, MASKS)
)
def test_second_order_with_every_option(architecture, head_dim, mask, compiler):
    compiled = compiler(architecture)
    dtype = torch.bool if mask == "bool" else torch.bfloat16
    attend(
        torch.bfloat16,
        head_dim,
        None if mask == "none" else torch.empty(1, 1, 256, 256, dtype=dtype),
        order=2,
        is_causal=True,
        window=(100, 5),
        softcap=2.0,
        dropout_p=0.1,
        slopes=torch.empty(4),
        heads_k=2,
    )
    for kernel in compiled:
        assert kernel.shared <= SHARED_BYTES[architecture], kernel[:4]
        assert kernel.registers >= 16, kernel[:4]


@pytest.mark.parametrize("order", [1, 2])
def test_strides_of_one(order, compiler):
    """Triton takes a stride of 1 for a constant, which has to survive the loop over a group's
    heads. A kernel that loses one does not compile."""
    compiled = compiler(90)
    attend(torch.bfloat16, 1, torch.empty(1, 4, 256, 256).bfloat16(), order=order, heads_k=2)
    assert "attention_mask_gradient_kernel" in {kernel.kernel for kernel in compiled}


@pytest.mark.parametrize(
    "architecture, head_dim, mask",
    [*every_pair(ARCHITECTURES, HEAD_DIMS, MASKS), (86, 256, "bool")],
)
def test_attention_with_every_option(architecture, head_dim, mask, compiler):
    compiled = compiler(architecture)
    dtype = torch.bool if mask == "bool" else torch.bfloat16
    tensor = None if mask == "none" else torch.empty(1, 1, 256, 256, dtype=dtype)
    attend(
        torch.bfloat16,
        head_dim,
        tensor,
        is_causal=True,
        window=(100, 5),
        softcap=2.0,
        dropout_p=0.1,
        slopes=torch.empty(4),
        heads_k=2,
    )
    kernels = {kernel.kernel for kernel in compiled}
    assert ("mask_list_kernel" in kernels) == (mask != "none")
    assert ("attention_mask_gradient_kernel" in kernels) == (mask == "float")
    assert all(kernel.shared <= SHARED_BYTES[architecture] for kernel in compiled)


@pytest.mark.parametrize(
    "dtype, fused", [("bf16", True), ("bf16", False), ("fp32", False), ("fp64", False)]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linear_relu(architecture, dtype, fused, compiler, monkeypatch):
    from fastattn.ops.triton import linear_relu

    monkeypatch.setattr(config, "fused_product", lambda *_: fused)
    compiled = compiler(architecture)
    x, w = (torch.empty(rows, 784, dtype=DTYPES[dtype]) for rows in (64, 128))
    out, bits = linear_relu.linear_relu_forward(x, w, w[:, 0])
    linear_relu.linear_relu_backward(out, x, w, bits, [True] * 3)
    linear_relu.linear_relu_jvp(x, w, bits, x, w, w[:, 0])
    assert len(compiled) == (4 if fused else 3)
    for kernel in compiled:
        assert kernel.shared <= SHARED_BYTES[architecture], kernel[:3]
        if dtype == "bf16":
            assert kernel.stack == 0, kernel[:3]
        if dtype == "bf16" and fused and architecture == 90:
            assert "wgmma.mma_async" in kernel.ptx, kernel.kernel


@pytest.mark.parametrize(
    "dtype, columns, rms",
    [
        ("bf16", 64, False),
        ("bf16", 768, True),
        ("bf16", 1001, False),
        ("bf16", 4096, False),
        ("bf16", 20000, False),
        ("fp32", 4096, False),
        ("fp64", 4096, False),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_add_norm(architecture, dtype, columns, rms, compiler):
    from fastattn.ops.triton import norm

    compiled = compiler(architecture)
    x, w = torch.empty(4096, columns, dtype=DTYPES[dtype]), torch.empty(columns)
    w = w.to(_wide(DTYPES[dtype]))
    seed = torch.zeros(1, dtype=torch.int64)
    out, total, *statistics = norm.dropout_add_norm_forward(x, x, w, w, seed, 0.1, 1e-5, rms)
    norm.dropout_add_norm_backward(
        out, out, total, w, *statistics, seed, 0.1, rms, [True] * 4
    )  # fmt: skip
    assert len(compiled) == (4 if columns > 16384 else 3)
    for kernel in compiled:
        assert kernel.shared <= SHARED_BYTES[architecture], kernel[:4]
        if dtype == "bf16":
            assert kernel.stack <= SPILLS, kernel[:4]
        if columns % 16 == 0:  # rows that start at multiples of 16 bytes
            assert "ld.global.v4" in kernel.ptx or "ld.global.v2.b64" in kernel.ptx, kernel.kernel


@pytest.mark.parametrize(
    "architecture, dtype, activation, dropout_p, columns",
    every_pair(ARCHITECTURES, DTYPES, ops.ACTIVATIONS, [0.0, 0.3], [4096, 1001]),
)
def test_activation(architecture, dtype, activation, dropout_p, columns, compiler):
    from fastattn.ops.triton import activation as launches

    compiled, number = compiler(architecture), ops.ACTIVATIONS.index(activation)
    x, seed = torch.empty(64, columns, dtype=DTYPES[dtype]), torch.zeros(1, dtype=torch.int64)
    launches.activation_forward(x, number, dropout_p, seed)
    launches.activation_backward(x, x, number, dropout_p, seed)
    assert [kernel.kernel for kernel in compiled] == ["activation_kernel"] * 2
    for kernel in compiled:
        assert kernel.shared <= SHARED_BYTES[architecture], kernel[:4]
        assert kernel.stack == 0, kernel[:4]
        if columns % 16 == 0:  # rows that start at multiples of 16 bytes
            assert "ld.global.v4" in kernel.ptx or "ld.global.v2.b64" in kernel.ptx, kernel[:4]
