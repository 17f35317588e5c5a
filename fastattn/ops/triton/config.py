"""The one table of tile sizes: kernel, architecture, bytes an element, head dim -> Tile.

Attention: a ``block_q x block_k`` tile of scores; the head dim is the larger of D and Dv rounded up
to a power of two. The limits: shared memory of 99 KB a block on sm_86 and sm_89, 163 KB on sm_80,
227 KB on sm_90 and sm_100; 64 K registers a block, 255 a thread.
"""

from __future__ import annotations

import os
from typing import NamedTuple, TypeVar

import torch

from fastattn.ops.triton.launch import next_power_of_2

KERNELS = (
    "forward", "keys", "queries", "mask_gradient", "jvp", "second_keys", "second_queries",
    "second_mask",
)  # fmt: skip

# FASTATTN_FLOAT32_PRODUCTS, read once. tf32x3: an operand is its first 11 bits and the next 11 or
# 12, and three products on the tensor cores leave out only that of the two remainders. ieee:
# float32 FMAs, whose peak on an H100 is two fifths of that.
FLOAT32_PRODUCTS = os.environ.get("FASTATTN_FLOAT32_PRODUCTS", "tf32x3")
if FLOAT32_PRODUCTS not in ("tf32x3", "ieee"):
    raise ValueError(
        f"FASTATTN_FLOAT32_PRODUCTS: expected tf32x3 or ieee, got {FLOAT32_PRODUCTS!r}"
    )


class Tile(NamedTuple):
    """The tile of scores of one step, a program's warps and the depth of its load pipeline."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False  # tensor descriptors for the operands that a program walks


INTERPRETED = Tile(16, 16, 1, 1)  # small: every odd shape has edges everywhere

# kernel -> architecture -> bytes an element -> largest head dim -> Tile. An architecture without a
# row takes that of the next older one.
_ATTENTION: dict[str, dict[int, dict[int, dict[int, Tile]]]] = {
    "forward": {
        80: {
            2: {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 1)},
            4: {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
            8: {64: Tile(32, 16, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)},
        },
        90: {
            2: {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
        },
    },
    "keys": {
        80: {
            2: {64: Tile(32, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(16, 64, 8, 1)},
            4: {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
            8: {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        },
        90: {
            2: {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(16, 64, 8, 1)},
        },
        100: {
            2: {64: Tile(64, 64, 8, 2), 128: Tile(32, 64, 8, 1), 256: Tile(16, 64, 8, 1)},
        },
    },
    "queries": {
        80: {
            2: {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 16, 8, 1)},
            4: {64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
            8: {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        },
        90: {
            2: {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
        },
        100: {
            2: {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
        },
    },
    "mask_gradient": {
        80: {
            2: {64: Tile(64, 64, 4, 1), 128: Tile(64, 64, 8, 1), 256: Tile(32, 32, 4, 1)},
            4: {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 4, 1)},
            8: {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)},
        },
    },
    # The second order. Registers limit everything: beside the sums there are three or four tiles of
    # scores. On sm_100 it is tensor memory, of which the sums alone take all for a head dim of 256.
    # Without tensor cores, IEEE float32 and float64, operands are in shared memory: from a head dim
    # of 128 on they spill whatever the tile, which shared memory then decides.
    "jvp": {
        80: {
            2: {64: Tile(128, 32, 8, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 4, 1)},
            4: {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
            8: {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(8, 16, 8, 1)},
        },
        90: {
            2: {64: Tile(128, 128, 8, 2), 128: Tile(128, 32, 8, 3), 256: Tile(128, 16, 8, 2)},
        },
        100: {
            2: {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
        },
    },
    "second_keys": {
        80: {
            2: {64: Tile(32, 32, 4, 2), 128: Tile(32, 64, 8, 1), 256: Tile(16, 32, 8, 1)},
            4: {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 8, 8, 1)},
            8: {64: Tile(16, 16, 4, 1), 128: Tile(16, 8, 4, 1), 256: Tile(16, 4, 4, 1)},
        },
        90: {
            # Masked tiles spill up to 8 and 64 bytes a thread at 64 and 128, full ones nothing.
            2: {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 3), 256: Tile(16, 64, 8, 2)},
        },
        100: {
            2: {64: Tile(64, 64, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 32, 8, 1)},
        },
    },
    "second_queries": {
        80: {
            2: {64: Tile(128, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 16, 4, 1)},
            4: {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(8, 16, 8, 1)},
            8: {64: Tile(16, 16, 4, 1), 128: Tile(8, 16, 4, 1), 256: Tile(8, 16, 8, 1)},
        },
        90: {
            2: {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 3), 256: Tile(128, 16, 8, 1)},
        },
        100: {
            2: {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 16, 8, 1)},
        },
    },
    "second_mask": {
        80: {
            2: {64: Tile(32, 64, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 32, 8, 1)},
            4: {64: Tile(32, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(8, 8, 8, 1)},
            8: {64: Tile(8, 8, 4, 1), 128: Tile(8, 8, 4, 1), 256: Tile(8, 8, 8, 1)},
        },
        90: {
            2: {64: Tile(64, 64, 4, 1), 128: Tile(64, 64, 8, 1), 256: Tile(64, 32, 8, 1)},
        },
    },
}

# The same where the TMA unit loads the operands that a program walks: 16 bits, rows of a multiple
# of 16 bytes. It needs no registers for addresses, which larger tiles make use of.
_TMA: dict[str, dict[int, dict[int, Tile]]] = {
    "forward": {90: {64: Tile(128, 128, 8, 3, True), 128: Tile(128, 128, 8, 2, True)}},
    "keys": {
        90: {64: Tile(64, 128, 8, 2, True), 128: Tile(32, 128, 8, 3, True)},
        100: {64: Tile(64, 64, 8, 2, True), 128: Tile(32, 128, 8, 3, True)},
    },
    "queries": {90: {64: Tile(128, 128, 8, 2, True), 128: Tile(128, 64, 8, 2, True)}},
    "jvp": {
        90: {64: Tile(128, 128, 8, 2, True), 128: Tile(128, 64, 8, 2, True)},
        100: {64: Tile(128, 64, 8, 2, True), 128: Tile(128, 64, 8, 2, True)},
    },
}

# The same for float32 on tensor cores. Both parts of both operands want registers or shared memory:
# from a head dim of 128 on what a program keeps is spilled, which costs less than the products
# gain. What is not here is IEEE: a tile that fits would repeat more products than it gains; tensor
# memory does not hold the parts on sm_100; and the second order, the difference of sums that nearly
# cancel, would come out too coarse before sm_90, whose tensor cores keep two bits below the largest
# term of a sum, older ones one.
_TF32: dict[str, dict[int, dict[int, Tile]]] = {
    "forward": {
        80: {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 1)},
        90: {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 1), 256: Tile(16, 64, 8, 1)},
        100: {64: Tile(128, 64, 8, 2)},
    },
    "keys": {
        80: {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1)},
        90: {64: Tile(32, 128, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(64, 16, 8, 1)},
        100: {},
    },
    "queries": {
        80: {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 4, 1)},
        90: {64: Tile(128, 32, 8, 2), 128: Tile(64, 16, 4, 1), 256: Tile(16, 64, 8, 1)},
        100: {},
    },
    "mask_gradient": {
        80: {64: Tile(32, 32, 8, 1)},
        90: {64: Tile(64, 32, 4, 1), 128: Tile(64, 32, 8, 1)},
        100: {},
    },
    "jvp": {90: {64: Tile(128, 32, 8, 1), 128: Tile(64, 16, 4, 1)}, 100: {}},
    "second_keys": {90: {64: Tile(16, 64, 4, 1)}, 100: {}},
    "second_queries": {90: {64: Tile(64, 16, 4, 1), 128: Tile(64, 16, 8, 1)}, 100: {}},
}


Entry = TypeVar("Entry")


def _newest(table: dict[int, Entry], capability: int) -> Entry:
    """The entry of the newest architecture that is not newer than the GPU."""
    return table[max(a for a in table if a <= capability)]


def _smallest(row: dict[int, Tile], head_dim: int) -> Tile | None:
    """The tile of the smallest head dim that is large enough."""
    return next((t for limit, t in sorted(row.items()) if head_dim <= limit), None)


def _tf32_tile(kernel: str, capability: int, head_dim: int) -> Tile | None:
    table = _TF32.get(kernel, {})
    if capability < min(table, default=capability + 1):
        return None
    return _smallest(_newest(table, capability), head_dim)


def tf32_allowed() -> bool:
    """Whether torch's settings allow products of float32 on the GPU to be TF32's, by the older one
    (``torch.set_float32_matmul_precision``) or a newer one, beside which the older raises."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def float32_products(kernel: str, capability: int, head_dim: int) -> str:
    """How an attention kernel multiplies float32: "tf32" (where torch's settings allow it),
    "tf32x3" or "ieee"."""
    if tf32_allowed():
        return "tf32"
    capability = 80 if _has_small_shared_memory(capability) else capability
    there = _tf32_tile(kernel, capability, head_dim) is not None
    return FLOAT32_PRODUCTS if there else "ieee"


def _has_small_shared_memory(capability: int) -> bool:
    return capability in (86, 87, 89) or capability >= 120


def unsupported(capability: int, element_bytes: int, head_dim: int) -> str | None:
    """Why a GPU cannot run the attention kernels, or None."""
    if capability < 80:
        return f"compute capability {capability / 10} is below 8.0"
    if element_bytes == 8 and head_dim > 128 and _has_small_shared_memory(capability):
        return f"float64 with head dim {head_dim} needs more shared memory than this GPU has"
    return None


def tile(
    kernel: str, capability: int, element_bytes: int, head_dim: int, tma: bool = False
) -> Tile:
    """The tile of an attention kernel of KERNELS; capability is 10 x major + minor; tma says
    whether the operands allow it."""
    capability = 80 if _has_small_shared_memory(capability) else capability
    chosen = None
    if tma and element_bytes == 2 and capability >= 90 and kernel in _TMA:
        chosen = _smallest(_newest(_TMA[kernel], capability), head_dim)
    if element_bytes == 4 and float32_products(kernel, capability, head_dim) != "ieee":
        chosen = _tf32_tile(kernel, capability, head_dim)
    table = _ATTENTION[kernel]
    row = _newest({a: r[element_bytes] for a, r in table.items() if element_bytes in r}, capability)
    chosen = chosen or _smallest(row, head_dim)
    assert chosen is not None  # the tables reach the largest head dim
    return chosen


# --- products ---------------------------------------------------------------------------------


class Product(NamedTuple):
    """A tile of a product's result, the depth of a step, warps, and the load pipeline."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


PRODUCTS = ("forward", "jvp", "input_gradient", "weight_gradient")
INTERPRETED_PRODUCT = Product(16, 16, 16, 1, 1)
WANTED_PROGRAMS = 264  # two for each processor of an H200
_FUSED_DEPTH = 1024  # above this cuBLAS and an element by element kernel are taken

# kernel -> architecture -> Product, for 16 bits: wider types go to cuBLAS
_PRODUCT: dict[str, dict[int, Product]] = {
    "forward": {80: Product(128, 64, 32, 4, 3), 90: Product(128, 64, 64, 4, 3)},
    "jvp": {80: Product(128, 64, 32, 4, 2), 90: Product(128, 64, 64, 4, 3)},
    "input_gradient": {80: Product(64, 64, 32, 4, 3), 90: Product(64, 128, 64, 4, 3)},
    "weight_gradient": {80: Product(64, 64, 32, 4, 3), 90: Product(64, 128, 64, 4, 3)},
}


def product(kernel: str, capability: int) -> Product:
    """The tile of a linear+ReLU kernel of PRODUCTS."""
    return _newest(_PRODUCT[kernel], capability)


def fused_product(m: int, n: int, k: int, element_bytes: int) -> bool:
    """Whether one Triton kernel does a linear layer's product, bias and ReLU; if not, cuBLAS and an
    element by element kernel do. Short sums are bound by memory, which fusion saves."""
    return element_bytes == 2 and max(n, k) <= _FUSED_DEPTH


# --- norms ------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Rows and columns of a step, and a program's warps."""

    rows: int
    columns: int
    num_warps: int


# kernel -> bytes of the accumulator -> most columns of a block -> rows and warps. A thread has at
# most 16 or 32 elements; the backward keeps five numbers of each: z, dy, w∘dy and two column sums.
_NORM: dict[str, dict[int, dict[int, tuple[int, int]]]] = {
    "forward": {
        4: {64: (32, 4), 256: (8, 4), 1024: (2, 4), 2048: (1, 4), 8192: (1, 8), 16384: (1, 16)},
        8: {64: (32, 4), 256: (8, 4), 1024: (2, 4), 2048: (1, 4), 4096: (1, 8), 8192: (1, 16)},
    },
    "backward": {
        4: {64: (32, 4), 256: (8, 4), 1024: (2, 4), 2048: (1, 4), 4096: (1, 8), 8192: (1, 16)},
        8: {64: (16, 4), 256: (4, 4), 1024: (1, 4), 2048: (1, 8), 4096: (1, 16)},
    },
}
ACTIVATION = Block(4, 512, 4)
WIDE_NORM = Block(1, 2048, 4)  # of a row that no block holds
NORM_COLUMN_SUMS = Block(4, 512, 4)  # of such rows
NORM_SHARES = Block(64, 16, 4)  # of the shares' column sums, which are added up
NORM_STEPS = 64  # a running sum of a share has at most so many terms


def norm(kernel: str, columns: int, accumulator_bytes: int) -> Block | None:
    """The block of a norm's kernel, "forward" or "backward", that holds whole rows; None where rows
    are too long for one."""
    row = _NORM[kernel][accumulator_bytes]
    limit = min((most for most in row if columns <= most), default=None)
    if limit is None:
        return None
    return Block(row[limit][0], max(16, next_power_of_2(columns)), row[limit][1])
