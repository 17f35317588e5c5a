"""What attention is tested with: masks and options by name, so that a test's parameters hold no
tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The options of a call. True stands for slopes of ALiBi, which the test draws. A window is narrow
# beside a block of keys, or named wide: one of 96 queries or of 192 keys lies within it or across
# its edge.
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (2, 1)},
    "one-sided window": {"window_size": (3, -1)},
    "left window": {"window_size": (3, 0)},
    "right window": {"window_size": (-1, 7)},
    "left window, causal": {"window_size": (9, -1), "is_causal": True},
    "wide window": {"window_size": (100, 30)},
    "wide left window, causal": {"window_size": (200, -1), "is_causal": True},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi_slopes": True},
    "dropout": {"dropout_p": 0.3},
    "negative scale": {"scale": -0.4},
    "everything": {
        "is_causal": True,
        "window_size": (11, 2),
        "softcap": 1.1,
        "alibi_slopes": True,
        "dropout_p": 0.4,
    },
    "everything, wide window": {
        "is_causal": True,
        "window_size": (100, 2),
        "softcap": 1.1,
        "alibi_slopes": True,
        "dropout_p": 0.4,
    },
}

# Which of the dimensions batch, heads, queries and keys a mask has in full; it is broadcast over
# the others. Those whose name ends with "bool" are bool.
_DIMENSIONS = {
    "bool": "bhqk",
    "shared bool": "bqk",
    "float": "bqk",
    "shared float": "hqk",
    "full float": "bhqk",
    "key bias": "bk",
    "head and key bias": "hk",
    "row bias": "hq",
    "shared row bias": "q",
    "head bias": "h",
}
# ", hidden" behind a name: some queries see nothing, and no query sees some of the keys.
MASKS = (
    "none",
    "padding",
    "blocks",
    "empty rows",
    *(f"{name}{more}" for name in _DIMENSIONS for more in ("", ", hidden")),
)


def make_mask(
    kind: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """A mask of a kind: True where a query sees a key, or random numbers to add to the scores.

    Args:
        kind: one of MASKS. "padding" has a length for each batch element; "blocks" has a quarter
            that is seen in full and one that is not seen at all; under "empty rows" every third
            query sees nothing, the first among them.
        shape: batch, heads, queries and keys of the scores.
        dtype: of a float mask.
        device: of the mask; its numbers are drawn on the CPU.

    Returns:
        A mask that broadcasts to ``shape``, or None of the kind "none".

    >>> make_mask("key bias", (2, 4, 8, 16), torch.float32).shape
    torch.Size([2, 1, 1, 16])
    """
    batch, _heads, seq_q, seq_k = shape
    if kind == "none":
        return None
    if kind == "padding":
        lengths = torch.linspace(max(1, seq_k // 3), seq_k, batch).long()
        return (torch.arange(seq_k)[None, None, None] < lengths[:, None, None, None]).to(device)
    if kind == "blocks":
        mask = torch.rand(batch, 1, seq_q, seq_k) > 0.4
        mask[:, :, ::5] = False
        mask[:, :, : seq_q // 2, : seq_k // 2] = True
        mask[:, :, seq_q // 2 :, : seq_k // 2] = False
        return mask.to(device)
    if kind == "empty rows":
        mask = torch.randn(1, 1, seq_q, seq_k, dtype=dtype)
        mask[:, :, ::3] = -math.inf
        return mask.to(device)
    name = kind.removesuffix(", hidden")
    sizes = [n if d in _DIMENSIONS[name] else 1 for d, n in zip("bhqk", shape, strict=True)]
    is_bool = name.endswith("bool")
    mask = torch.rand(sizes) > 0.4 if is_bool else torch.randn(sizes, dtype=dtype)
    if kind != name:
        lowest = False if is_bool else -math.inf
        if sizes[2] > 2:
            mask[:, :, 2::7] = lowest
        if sizes[3] > 1:
            mask[..., 1::5] = lowest
    return mask.to(device)
