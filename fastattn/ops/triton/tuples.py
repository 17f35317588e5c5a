"""The named tuples that the attention kernels take and hand to their functions.

Kernels name them as attributes of this module, for the reason that flags.py gives. The types are
those on the host; in a kernel a tensor is a pointer and a number a scalar.

A tuple of tuples ends with a field that is always None. Triton takes a stride of 1 for a constant,
and gives the outer tuple its new type only when it sets a constant of the outer tuple's own, the
last of them last. A loop rebuilds the tuples of its kernel by their types, and would lose the 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Shape(NamedTuple):
    """Head dims and the tile of scores, all known at compile time."""

    d: int
    dv: int
    block_d: int  # d rounded up to a power of two
    block_dv: int
    block_q: int  # rows of the tile
    block_k: int  # columns


class Strides(NamedTuple):
    """The strides of batch, head and row of the tensors that a kernel takes; None of the others."""

    q: tuple | None = None
    k: tuple | None = None
    v: tuple | None = None
    o: tuple | None = None
    do: tuple | None = None
    t_q: tuple | None = None  # t_: tangents
    t_k: tuple | None = None
    t_v: tuple | None = None
    t_o: tuple | None = None
    dq: tuple | None = None  # d: gradients, of either order
    dk: tuple | None = None
    dv: tuple | None = None
    rows: tuple | None = None  # of batch and head of what there is one of for each row
    none: Any = None


class Mask(NamedTuple):
    """A mask ``[B, Hq, Sq, Sk]`` of bytes or floats, and the blocks that it leaves to each block of
    queries, or of keys where the kernel walks queries."""

    p: Tensor | None = None
    strides: tuple | None = None  # of batch, head, row, column; 0 where broadcast
    lists: Tensor | None = None  # [..., 2, blocks]: those seen in part; in full
    counts: Tensor | None = None  # [..., 2]
    list_strides: tuple | None = None  # of batch, head, block: in counts, in pairs
    t: Tensor | None = None  # the mask's tangent
    t_strides: tuple | None = None
    none: Any = None


class Place(NamedTuple):
    """What a program works on: a block of queries or keys of one head."""

    i_block: Any
    i_b: Any
    i_h: Any
    i_hk: Any  # the key head of query head i_h
    batch: Any  # the same in 64 bits, for offsets; 0 for packed sequences
    head: Any
    key_head: Any
    start_q: Any  # the first row of the sequence
    start_k: Any
    seq_q: Any  # and how many it has
    seq_k: Any
    first: Any  # of the block's queries or keys


class Rows(NamedTuple):
    """The rows of one head: a pointer to the first, or the descriptor of all of ``[B, H, S, D]``
    with the head's place in it."""

    x: Any
    stride: Any
    count: Any
    i_b: Any
    i_h: Any


class Band(NamedTuple):
    """What decides which keys a query sees."""

    seq_q: Any
    seq_k: Any
    left: Any
    right: Any
    p_mask: Any  # of this batch element and head
    mask_strides: Any


class Dropout(NamedTuple):
    """What a head's keep-mask is drawn from."""

    seed: Any
    element: Any  # which of the batch elements that share the seed this is
    i_h: Any
    threshold: Any
    scale: Any  # 1 / (1 - p)


class Seeds(NamedTuple):
    """What the keep-mask of rows is drawn from: each seed serves so many of them."""

    p: Any
    rows: Any
    threshold: Any
    scale: Any  # 1 / (1 - p)


class Weights(NamedTuple):
    """What turns a head's products of queries and keys into scores and weights, E1-E4."""

    band: Band
    scale: Any
    cap_scale: Any
    cap: Any
    slope: Any
    dropout: Dropout
    p_t_mask: Any  # the mask's tangent, of this batch element and head
    t_mask_strides: Any
