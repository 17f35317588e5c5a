"""An attention call as the Triton kernels see it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn._call import Extras, Inputs, Options
from fastattn.ops.triton import MAX_HEAD_DIM, capability, config, flags, interpreting
from fastattn.ops.triton.launch import next_power_of_2
from fastattn.ops.triton.tuples import Shape

FLAG = {
    name: getattr(flags, name).value
    for name in (
        "WINDOW_LEFT", "WINDOW_RIGHT", "BOOL_MASK", "FLOAT_MASK", "SOFTCAP", "ALIBI", "DROPOUT",
        "NEGATIVE_SCALE", "VARLEN", "WIDE", "UPCAST", "TF32", "LSE_GRADIENT", "MASKED", "WINDOWED",
        "TMA", "T_QUERY", "T_KEY", "T_VALUE", "T_MASK", "SECOND_ORDER", "TF32X3",
    )
}  # fmt: skip
_L2_BYTES = 24 << 20  # what a section of heads may keep in a cache of 40 or 50 MB


def require(good: bool, argument: str, expected: str, got: object) -> None:
    if not good:
        raise RuntimeError(f"{argument}: expected {expected}, got {got}")


def _check(inputs: Inputs, extras: Extras, options: Options) -> None:
    """What a direct call of the op must satisfy; the user's functions have checked more."""
    query, key, value, attn_mask = inputs
    slopes, seed, starts_q, starts_k = extras
    scale, p = options.scale, options.dropout_p
    require(query.dim() >= 3, "query", "[*, heads, seq, dim]", tuple(query.shape))
    batch = query.shape[:-3]
    for name, x in (("key", key), ("value", value)):
        require(x.dtype == query.dtype, name, f"dtype {query.dtype}", x.dtype)
        require(x.device == query.device, name, f"device {query.device}", x.device)
        require(x.shape[:-3] == batch, name, f"batch {tuple(batch)}", tuple(x.shape))
    require(query.dtype in _DTYPES, "query", "a floating dtype", query.dtype)
    require(key.shape[-1] == query.shape[-1], "key", f"D = {query.shape[-1]}", tuple(key.shape))
    require(key.shape[:-1] == value.shape[:-1], "value", f"{tuple(key.shape[:-1])} x Dv",
             tuple(value.shape))  # fmt: skip
    heads_q, heads_k = query.shape[-3], key.shape[-3]
    require(heads_k > 0 and heads_q % heads_k == 0 if heads_q else True, "key",
             f"heads that divide {heads_q}", heads_k)  # fmt: skip
    for name, x in (("query", query), ("value", value)):
        require(x.shape[-1] <= MAX_HEAD_DIM, name, f"head dim <= {MAX_HEAD_DIM}", x.shape[-1])
    if attn_mask is not None:
        full = (*query.shape[:-1], key.shape[-2])
        require(attn_mask.dim() == query.dim(), "attn_mask", f"{query.dim()} dimensions",
                 attn_mask.dim())  # fmt: skip
        fits = all(m in (1, n) for m, n in zip(attn_mask.shape, full, strict=True))
        require(fits, "attn_mask", f"a shape that broadcasts to {full}", tuple(attn_mask.shape))
        require(attn_mask.dtype in (torch.bool, query.dtype), "attn_mask",
                 f"bool or {query.dtype}", attn_mask.dtype)  # fmt: skip
    require(math.isfinite(scale), "scale", "a finite number", scale)
    require(0 <= p < 1, "dropout_p", "a probability in [0, 1)", p)
    if p > 0:
        elements = math.prod(batch) if starts_q is None else starts_q.shape[0] - 1
        good = (
            seed is not None
            and seed.dtype == torch.int64
            and seed.numel() > 0
            and elements % seed.numel() == 0
        )
        got = seed if seed is None else (seed.dtype, tuple(seed.shape))
        require(good, "seed", f"int64 [n] with n a divisor of the batch of {elements}", got)
    if slopes is not None:
        good = slopes.shape[-1:] == query.shape[-3:-2] and slopes.dim() in (1, 2)
        require(good, "alibi_slopes", f"[{heads_q}] or [B, {heads_q}]", tuple(slopes.shape))
    if starts_q is not None:
        good = starts_k is not None and starts_k.shape == starts_q.shape and starts_q.dim() == 1
        require(good, "starts_k", f"{tuple(starts_q.shape)} as starts_q", starts_k)
        require(query.dim() == 4 and query.shape[0] == 1, "query", "[1, heads, tokens, dim]",
                 tuple(query.shape))  # fmt: skip
        require(attn_mask is None, "attn_mask", "none beside packed sequences", attn_mask)


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def four_dims(x: Tensor) -> Tensor:
    """``[B, H, S, D]`` with a unit last stride, a view wherever one exists."""
    x = x[None] if x.dim() == 3 else x.flatten(0, -4) if x.dim() > 4 else x
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def row_strides(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()[:3]


@dataclass
class Problem:
    """A call as the kernels see it: 4 dimensions, one scale for everything, FLAGS."""

    q: Tensor  # [B, Hq, Sq, D]
    k: Tensor  # [B, Hk, Sk, D]
    v: Tensor  # [B, Hk, Sk, Dv]
    mask: Tensor | None  # [B, Hq, Sq, Sk], each extent possibly 1
    slopes: Tensor | None  # [B, Hq]
    seed: Tensor | None  # [n], each for B / n batch elements
    starts_q: Tensor | None
    starts_k: Tensor | None
    seq_q: int
    seq_k: int
    left: int
    right: int
    scale: float
    softcap: float
    dropout_p: float

    def __post_init__(self) -> None:
        q = self.q
        if self.seq_q == 0 or self.seq_k == 0:
            self.mask = None  # there is nothing to mask
        self.batch = q.shape[0] if self.starts_q is None else self.starts_q.shape[0] - 1
        self.heads_q, self.heads_k = q.shape[1], self.k.shape[1]
        self.group = self.heads_q // max(1, self.heads_k)
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        bits = {
            "WINDOW_LEFT": self.left >= 0,
            "WINDOW_RIGHT": self.right >= 0,
            "BOOL_MASK": self.mask is not None and self.mask.dtype == torch.bool,
            "FLOAT_MASK": self.mask is not None and self.mask.dtype != torch.bool,
            "SOFTCAP": self.softcap > 0,
            "ALIBI": self.slopes is not None,
            "DROPOUT": self.dropout_p > 0,
            "NEGATIVE_SCALE": self.scale <= 0,
            "VARLEN": self.starts_q is not None,
            "WIDE": is_wide(q, self.k, self.v, self.mask),
            "UPCAST": interpreting() and q.dtype == torch.bfloat16,
        }
        self.flags = sum(FLAG[name] for name, on in bits.items() if on)
        cap = self.softcap
        self.numbers = {
            "scale": self.scale,
            "cap_scale": self.scale / cap if cap > 0 else 0.0,
            "cap": cap,
            "keep_scale": 1.0 / (1.0 - self.dropout_p),
        }
        if self.slopes is not None:
            slopes = self.slopes.to(self.dtype)
            self.slopes = slopes.expand(self.batch, self.heads_q).contiguous()
        if self.mask is not None and bits["BOOL_MASK"]:
            self.mask = self.mask.view(torch.uint8)
        if self.seed is not None:
            self.seed = self.seed.reshape(-1).contiguous() if bits["DROPOUT"] else None

    def widen(self, *tensors: Tensor | None) -> None:
        """Offsets of 64 bits where one of these asks for them too."""
        if is_wide(*tensors):
            self.flags |= FLAG["WIDE"]

    def shared(self) -> Extras:
        """The tensors without a derivative, as the kernels take them."""
        return Extras(self.slopes, self.seed, self.starts_q, self.starts_k)

    def window(self) -> tuple[int | None, int | None]:
        """The window's bounds as the kernels take them."""
        return (self.left if self.left >= 0 else None, self.right if self.right >= 0 else None)

    def tokens(self) -> tuple[int | None, int | None]:
        """The rows of all packed sequences."""
        packed = self.starts_q is not None
        return (self.q.shape[2], self.k.shape[2]) if packed else (None, None)

    def tile(self, kernel: str, *walked: Tensor | None) -> config.Tile:
        """The tile of a kernel whose programs walk the ``[B, H, S, D]`` operands given."""
        there = [x for x in walked if x is not None]
        tma = bool(there) and self.starts_q is None and all(map(_tma_can_load, there))
        if interpreting():
            return config.INTERPRETED._replace(tma=tma and config.INTERPRETED.tma)
        size = self.q.element_size()
        return config.tile(kernel, capability(self.q.device.index), size, max(self.blocks_d), tma)

    @property
    def blocks_d(self) -> tuple[int, int]:
        return _block_d(self.q), _block_d(self.v)

    def section(self, rows: int, heads: int) -> int:
        """How many heads' worth of ``rows`` rows of D + Dv stay in L2."""
        row = (self.q.shape[-1] + self.v.shape[-1]) * self.q.element_size()
        return max(1, min(self.batch * heads, _L2_BYTES // max(1, rows * row)))

    def common(self, kernel: str, tile: config.Tile) -> dict:
        """The keyword arguments of every kernel that computes scores."""
        block_d, block_dv = self.blocks_d
        left, right = self.window()
        drops = self.dropout_p > 0
        return {
            "seq_q": self.seq_q,
            "seq_k": self.seq_k,
            "left": left,
            "right": right,
            "seed_batch": self.batch // self.seed.numel() if self.seed is not None else None,
            "threshold": math.floor(self.dropout_p * 2**32) if drops else None,
            **self.numbers,
            "SHAPE": Shape(
                self.q.shape[-1],
                self.v.shape[-1],
                block_d,
                block_dv,
                tile.block_q,
                tile.block_k,
            ),
            "FLAGS": self.flags | self._products(kernel) | (FLAG["TMA"] if tile.tma else 0),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "device": self.q.device,
        }

    def _products(self, kernel: str) -> int:
        if self.q.dtype != torch.float32 or interpreting():
            return 0  # the interpreter multiplies float32 as numpy does
        gpu = capability(self.q.device.index)
        how = config.float32_products(kernel, gpu, max(self.blocks_d))
        return 0 if how == "ieee" else FLAG[how.upper()]

    def walked(self, tile: config.Tile, rows: int, *operands: Tensor | None) -> list:
        """Operands as a kernel takes them that walks them ``rows`` at a time."""
        if not tile.tma:
            return list(operands)
        return [
            x if x is None else TensorDescriptor.from_tensor(x, [1, 1, rows, _block_d(x)])
            for x in operands
        ]


def _block_d(x: Tensor) -> int:
    return max(16, next_power_of_2(x.shape[-1]))


def mask_strides(mask: Tensor | None) -> tuple[int, ...] | None:
    """0 where broadcast."""
    if mask is None:
        return None
    return tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))


def _tma_can_load(x: Tensor) -> bool:
    """16-byte aligned rows, heads and batch elements, none of them empty or broadcast."""
    size = x.element_size()
    return (
        x.numel() > 0
        and x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and all(s > 0 and s * size % 16 == 0 for s in x.stride()[:-1])
    )


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether the offsets inside one head, and a tile beyond it, pass 2^31."""
    return any(
        (x.shape[-2] + 256) * x.stride(-2) + (x.shape[-1] + 256) * x.stride(-1) >= 2**31
        for x in tensors
        if x is not None
    )


def mask_4d(mask: Tensor, batch: torch.Size) -> Tensor:
    """``[B, Hq, Sq, Sk]``, each extent possibly 1."""
    batch = batch if math.prod(mask.shape[:-3]) > 1 else mask.shape[:-3]
    return mask.expand(*batch, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


def make_problem(inputs: Inputs, extras: Extras, options: Options) -> Problem:
    _check(inputs, extras, options)
    q, k, v = map(four_dims, inputs[:3])
    mask = inputs.attn_mask
    if mask is not None:
        mask = mask_4d(mask, inputs.query.shape[:-3])
    slopes, seed, starts_q, starts_k = extras
    if slopes is not None and slopes.dim() == 2:
        batch = q.shape[0] if starts_q is None else starts_q.shape[0] - 1
        good = (slopes.shape[0] > 0 and batch % slopes.shape[0] == 0) or batch == 0
        require(good, "alibi_slopes", f"rows that divide the batch of {batch}", tuple(slopes.shape))
        # Each row serves as many batch elements that follow each other.
        slopes = slopes.repeat_interleave(batch // max(1, slopes.shape[0]), 0)
    return Problem(
        q,
        k,
        v,
        mask,
        slopes,
        seed,
        starts_q,
        starts_k,
        seq_q=q.shape[2] if starts_q is None else options.max_q,
        seq_k=k.shape[2] if starts_k is None else options.max_k,
        left=options.left,
        right=0 if options.is_causal else options.right,
        scale=options.scale,
        softcap=options.softcap,
        dropout_p=options.dropout_p,
    )


def like_rows(x: Tensor, head_dim: int, varlen: bool) -> Tensor:
    """Uninitialised ``[B, H, S, head_dim]``; tokens outermost where sequences are packed."""
    batch, heads, rows, _ = x.shape
    if varlen:
        return x.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)
    return x.new_empty((batch, heads, rows, head_dim))
