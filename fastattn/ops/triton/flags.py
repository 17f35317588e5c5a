"""The bits of FLAGS, a kernel's compile-time options.

Kernels name them as attributes of this module: a global that a kernel names by itself is compared
at every launch, which for twenty of them takes as long as all the rest of a launch. Nor does
Triton's cache on disk look at the numbers: a bit keeps its meaning for ever, new ones come last.
"""

import triton.language as tl

WINDOW_LEFT = tl.constexpr(1)
WINDOW_RIGHT = tl.constexpr(2)  # is_causal is a right bound of 0
BOOL_MASK = tl.constexpr(4)
FLOAT_MASK = tl.constexpr(8)
SOFTCAP = tl.constexpr(16)
ALIBI = tl.constexpr(32)
DROPOUT = tl.constexpr(64)
NEGATIVE_SCALE = tl.constexpr(128)  # or 0
VARLEN = tl.constexpr(256)
WIDE = tl.constexpr(512)  # a head's offsets pass 2^31
UPCAST = tl.constexpr(1024)  # the interpreter multiplies bfloat16 as integers
TF32 = tl.constexpr(2048)  # float32 products: of operands rounded to 11 bits
LSE_GRADIENT = tl.constexpr(4096)
TMA = tl.constexpr(8192)  # the streamed operands are tensor descriptors
T_QUERY = tl.constexpr(1 << 14)  # which tangents there are
T_KEY = tl.constexpr(1 << 15)
T_VALUE = tl.constexpr(1 << 16)
T_MASK = tl.constexpr(1 << 17)
SECOND_ORDER = tl.constexpr(1 << 18)  # the mask's gradient is E14's
TF32X3 = tl.constexpr(1 << 19)  # float32 products: three of rounded operands and remainders

MASKED = tl.constexpr(4 + 8)
SCALED = tl.constexpr(8 + 16 + 32 + 128)  # the scores are more than products times a factor > 0
WINDOWED = tl.constexpr(1 + 2)
MAY_BE_EMPTY = tl.constexpr(1 + 4 + 8)  # a right bound alone leaves key 0 to every row
T_SCORES = tl.constexpr((1 << 14) + (1 << 15) + (1 << 17))  # tangents that move the scores

# What the backward's kernels know of a row, in so many numbers side by side: row_max, log_sum in
# base 2, Δ; of the second order μ and β too.
ROW = tl.constexpr(4)
SECOND_ROW = tl.constexpr(8)
