"""The one table of tile sizes: kernel, architecture, bytes an element, head dim -> Tile.

Attention: a ``block_q x block_k`` tile of scores; the head dim is the larger of D and Dv rounded up
to a power of two. The limits: shared memory of 99 KB a block on sm_86 and sm_89, 163 KB on sm_80,
227 KB on sm_90 and sm_100; 64 K registers a block, 255 a thread.
"""

from __future__ import annotations

from typing import NamedTuple

KERNELS = (
    "forward", "keys", "queries", "mask_gradient", "jvp", "second_keys", "second_queries",
    "second_mask",
)  # fmt: skip


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
    # float32 and float64 have no tensor cores, and operands in shared memory: from a head dim of
    # 128 on they spill whatever the tile, which shared memory then decides.
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
            2: {64: Tile(32, 64, 8, 2), 128: Tile(32, 64, 8, 1), 256: Tile(16, 32, 8, 1)},
            4: {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 8, 8, 1)},
            8: {64: Tile(16, 16, 4, 1), 128: Tile(16, 8, 4, 1), 256: Tile(16, 4, 4, 1)},
        },
        90: {
            # 128: masked tiles spill up to 64 bytes a thread, full ones nothing
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
    "keys": {90: {64: Tile(64, 128, 8, 2, True), 128: Tile(32, 128, 8, 3, True)}},
    "queries": {90: {64: Tile(128, 128, 8, 2, True), 128: Tile(128, 64, 8, 2, True)}},
    "jvp": {
        90: {64: Tile(128, 128, 8, 2, True), 128: Tile(128, 64, 8, 2, True)},
        100: {64: Tile(128, 64, 8, 2, True), 128: Tile(128, 64, 8, 2, True)},
    },
}


def _newest(table: dict[int, object], capability: int) -> object:
    """The entry of the newest architecture that is not newer than the GPU."""
    return table[max(a for a in table if a <= capability)]


def _has_small_shared_memory(capability: int) -> bool:
    return capability in (86, 87, 89) or capability >= 120


def why_not(capability: int, element_bytes: int, head_dim: int) -> str | None:
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
    if tma and element_bytes == 2 and capability >= 90 and kernel in _TMA:
        row = _newest(_TMA[kernel], capability)
        if head_dim <= max(row):
            return next(t for limit, t in sorted(row.items()) if head_dim <= limit)
    table = _ATTENTION[kernel]
    row = _newest({a: r[element_bytes] for a, r in table.items() if element_bytes in r}, capability)
    return next(t for limit, t in sorted(row.items()) if head_dim <= limit)


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
