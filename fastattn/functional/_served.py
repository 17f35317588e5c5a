"""Is this an ordinary call, one that a kernel may take in place of torch's own operations?

A drop-in asks before each call. Where the answer is no, it runs torch's code, with torch's results
and torch's errors. Nothing here raises and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from fastattn import _products, backends
from fastattn._problem import autocast_dtype, computed_dtype, follows_autocast
from fastattn.functional._autograd import transforming
from fastattn.functional._torch_internals import (
    FakeTensor,
    function_modes,
    tracing_state,
    watched,
)


def unobserved() -> bool:
    """Whether nobody watches or records torch's operations: no ``torch.jit.trace``, no dispatch
    mode (``make_fx``, fake tensors, counters of operations), no torch function mode but the one
    that sets the default device."""
    if torch.compiler.is_compiling():
        return True  # Dynamo has guards of its own
    return not watched()


def readable(x: object) -> bool:
    """A quick test before each call: whether ``x`` is a tensor on a CPU whose attributes nobody
    sees being read; a torch function mode would, and ``torch.jit.trace`` records it."""
    return type(x) is Tensor and not function_modes() and tracing_state() is None and x.is_cpu


def ordinary(*tensors: Any, exported: bool = False) -> bool:
    """Whether each is None or a dense strided tensor with data: no subclass, and no sparse, nested
    or meta tensor. ``exported``: the fake tensors of ``torch.export`` will do."""
    kinds: tuple[type, ...] = (Tensor, torch.nn.Parameter)
    if exported and torch.compiler.is_compiling():
        kinds = (*kinds, FakeTensor)
    for x in tensors:
        if x is None:
            continue
        if type(x) not in kinds:
            return False
        if x.layout is not torch.strided or x.is_nested or x.is_meta:
            return False
    return True


# Multiply-adds of a Sequential's Linears below which torch's own modules are faster on a CPU.
# Torch's time over the kernels', float32, Zen 4 with AVX-512, one and two threads, forward and
# training step: at 0.6 million 0.65 to 0.78, at 6.5 0.88 to 0.95, at 26 0.89 to 1.03, at 34 0.97 to
# 1.12, at 104 0.97 to 1.07, at 604 1.05 to 1.19. On Zen 5, one thread: at 0.6 million 1.09 and 0.9,
# at 1.6 1.5 and 1.1, at 2.4 1.4 and 1.2, at 6.5 1.8 and 1.5.
LEAST_WORK = 1 << 25


def least_work(dtype: torch.dtype) -> int:
    """LEAST_WORK on this processor."""
    return LEAST_WORK >> _products.work_shift(dtype)


def small_below(modules: Iterable[torch.nn.Module]) -> int:
    """The number of elements of an input below which the Linears among ``modules`` have so little
    to do on a CPU that checks and a kernel call take longer than they save; 0 for no Linear."""
    linears = [m for m in modules if isinstance(m, torch.nn.Linear)]
    weights = sum(m.in_features * m.out_features for m in linears)
    if not weights:
        return 0
    return least_work(linears[0].weight.dtype) * linears[0].in_features // weights


def is_small_product(input: Tensor, weights: int) -> bool:
    """Whether layers with so many ``weights`` in all have so little to do with an ordinary input
    that a kernel call takes longer than it saves."""
    if not input.is_cpu or input.dtype in _products._LACKING:
        return False
    return input.numel() * weights < least_work(computed_dtype(input)) * input.shape[-1]


# Multiply-adds of an attention's two products below which torch's is faster on a CPU. Torch's time
# over the kernels', float32, Zen 4 with AVX-512, one thread, forward and with backward: at 2
# thousand 0.18 and 0.40, at 0.5 million 0.44 and 0.65, at 2 million 0.79 and 0.83, at 8 million
# 1.05 and 1.09, at 34 million 1.26.
LEAST_ATTENTION = 1 << 22


def has_few_products(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether attention's two products are so small that torch's takes less time."""
    columns = query.shape[-1] + value.shape[-1]
    return query.numel() * key.shape[-2] * columns < LEAST_ATTENTION * query.shape[-1]


def is_small_attention(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> bool:
    """Whether attention on a CPU is so small that torch's takes less time than a kernel call.

    The kernels take three kinds of calls at any size: with dropout; in a dtype that torch has no
    product in; and those that may be differentiated, since torch's fused attention has no second
    derivative.
    """
    if not query.is_cpu or dropout_p > 0.0 or torch.compiler.is_compiling() or transforming():
        return False
    if not has_few_products(query, key, value):
        return False
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return False
    return computed_dtype(query) not in _products._LACKING


def serves_layers(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    exported: bool = False,
) -> bool:
    """Whether a kernel takes ``linear_relu`` or ``mlp`` with these. Not where shapes, dtypes or
    devices do not fit together: torch refuses these, or broadcasts them."""
    if input is None or not ordinary(input, *weights, *biases, exported=exported):
        return False
    shape = input.shape
    if not shape:
        return False
    width, device, dtype, one_dtype = shape[-1], input.device, input.dtype, True
    for weight, bias in zip(weights, biases, strict=True):
        shape = weight.shape
        if len(shape) != 2 or shape[1] != width or weight.device != device:
            return False
        width = shape[0]
        one_dtype = one_dtype and weight.dtype == dtype
        if bias is not None:
            if bias.shape != (width,) or bias.device != device:
                return False
            one_dtype = one_dtype and bias.dtype == dtype
    computed = autocast_dtype(device.type)
    if computed is not None and follows_autocast(input):
        dtype = computed
    if not one_dtype:
        tensors = (x for x in (input, *weights, *biases) if x is not None)
        if computed is None or not all(map(follows_autocast, tensors)):
            return False
    if any(backends.has_served_on_cpu(op, device, dtype) for op in ("mlp", "linear_relu")):
        return True
    problem = backends.linear_problem("linear_relu", input, weights)
    return backends.serves(problem._replace(dtype=dtype) if computed is not None else problem)


# Elements below which torch's dropout, sum and norm take less time than a kernel call.
LEAST_NORM = 1 << 13
# The same without dropout. Torch's time over the kernel's, float32, Zen 4, one thread, forward, of
# an RMSNorm that is written out: at 6 thousand elements 0.89, at 25 thousand 0.96, at 98 thousand
# 1.55, at 786 thousand 2.46, with backward 1.1, 1.2, 1.3, 1.4; a module's checks included, at 65
# thousand 1.07 to 1.15 and 1.3. Of a sum and a LayerNorm, forward: 0.37, 0.67, 1.24, 1.55, with
# backward 0.60, 0.80, 0.97, 0.98.
LEAST_RMS_NORM = 1 << 16
LEAST_LAYER_NORM = 1 << 16
# Of dropout by itself, forward and with backward: at 2 thousand 1.4 and 0.75, at 4 thousand 2.3 and
# 0.94, at 8 thousand 3.6 and 1.2, at 66 thousand 10 and 2.0. In float64 twice as many: with
# backward 0.92 at 8 thousand, 1.08 at 16.
LEAST_DROPOUT = 1 << 13
# Of an activation without dropout, beside torch's function for it or, where it has none, the
# formula. gelu_tanh: at 8 thousand 1.2 and 0.97, at 16 thousand 1.9 and 1.2, at 262 thousand 4.5
# and 1.6. The others: at 16 thousand 0.4 to 0.9 and 0.9 to 1.0, at 262 thousand 1.4 to 1.8 and 1.1.
LEAST_ACTIVATION = {"gelu_tanh": 1 << 14, "quick_gelu": 1 << 18, "relu2": 1 << 18}


def least_norm(kind: str, dropout_p: float) -> int:
    """The elements from which a kernel is faster for a norm with what is before it."""
    if dropout_p > 0.0:
        return LEAST_NORM
    return LEAST_LAYER_NORM if kind == "layer" else LEAST_RMS_NORM


def least_activation(activation: str | None, dropout_p: float) -> int | None:
    """The elements from which a kernel is faster for an activation and dropout; None: never."""
    if dropout_p > 0.0:
        return LEAST_DROPOUT
    return LEAST_ACTIVATION.get(activation or "")


def is_row_problem(*tensors: Tensor | None, least: int) -> bool:
    """Whether contiguous ordinary tensors of one shape on a CPU have so many elements."""
    given = [x for x in tensors if x is not None]
    first = given[0]
    if first.numel() < least or not first.is_cpu:
        return False
    return all(x.shape == first.shape and x.is_contiguous() for x in given)


def serves_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a kernel takes ``dropout_add_norm`` with such an input, and is faster where elements
    are dropped."""
    if not ordinary(input, weight, bias, exported=True) or input.numel() < LEAST_NORM:
        return False
    if input.device.type != "cpu" or any(
        x is not None and x.device != input.device for x in (weight, bias)
    ):
        return False
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    vectors = [x.dtype for x in (weight, bias) if x is not None]
    if len(set(vectors)) > 1 or not all(dtype in (input.dtype, wide) for dtype in vectors):
        return False
    return backends.serves(backends.rows_problem("dropout_add_norm", input))


def is_large_dropout(input: Tensor) -> bool:
    """Whether the kernels' dropout of ``input``, which lies on a CPU, is faster."""
    if input.numel() < LEAST_DROPOUT:
        return False
    return input.dtype != torch.float64 or input.numel() >= 2 * LEAST_DROPOUT


def serves_dropout(input: Any) -> bool:
    """Whether a kernel takes dropout by itself of ``input``, whatever was given, and is faster.
    Torch's result lies in memory as its input does, the kernels' is contiguous."""
    if not ordinary(input, exported=True) or input is None or transforming():
        return False
    if not input.is_cpu or not input.dim() or not input.is_contiguous():
        return False
    if not is_large_dropout(input):
        return False
    return backends.select_activation(input) == "cpu"


def serves_rms_norm(input: Any, weight: Any, eps: Any) -> bool:
    """Whether a kernel takes the RMSNorm of ``input``, whatever was given, and is faster."""
    if not ordinary(input, weight) or input is None or weight is None or not input.dim():
        return False
    if not input.is_cpu or input.numel() < LEAST_RMS_NORM or not isinstance(eps, float):
        return False
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if weight.device != input.device or weight.shape != input.shape[-1:] or transforming():
        return False
    return backends.select_activation(input, op="dropout_add_norm") == "cpu"


def is_torchs_product(input: object, n_out: int) -> bool:
    """A quick test before each call: whether a Linear's product with ``input``, an ordinary
    tensor on a CPU without autocast, is too small for the kernels."""
    return (
        type(input) is Tensor
        and input.is_cpu
        and input.numel() * n_out < _products.least_work(input.dtype)
        and not torch.is_autocast_enabled("cpu")
    )


def product_wins(input: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels' product of a Linear, or of several with one input, is faster than
    torch's."""
    if any(weight.dim() != 2 for weight in weights):
        return False
    rows = input.numel() // max(1, input.shape[-1]) if input.dim() else 0
    n_out = sum(weight.shape[0] for weight in weights)
    dtype = computed_dtype(input)
    return _products.why_torchs(rows, n_out, weights[0].shape[1], dtype, input.device) is None


def fuses(input: Tensor, weight: Tensor, activation: str | None, dropout_p: float = 0.0) -> bool:
    """Whether the kernels' product with what follows it is faster than torch's operations."""
    gains = activation is not None and (dropout_p > 0.0 or epilogue_wins(input, activation))
    return (gains and not is_small_product(input, weight.numel())) or product_wins(input, weight)


def epilogue_wins(input: Tensor, activation: str | None) -> bool:
    """Whether a linear layer of ``input`` gains by an activation in the same call."""
    return _products.epilogue_wins(computed_dtype(input), activation, input.device)


# Rows from which the kernels multiply with a weight that lies crosswise, [in_features,
# out_features], in less time than torch.addmm in float32. Its time over theirs, Zen 4, forward and
# backward: 0.3 with 16 rows, 0.8 with 32, 1.3 with 128, 1.9 and more from 512 on.
LEAST_ROWS = 128


def crosswise_product_wins(input: Tensor, weight: Tensor) -> bool:
    """``product_wins`` for a weight ``[in_features, out_features]``."""
    many = computed_dtype(input) == torch.float32 and input.numel() >= LEAST_ROWS * len(weight)
    if not many and computed_dtype(input) not in _products._LACKING:
        return False
    return product_wins(input, weight.t())


def serves_sdpa(query: Any, key: Any, value: Any, attn_mask: Any) -> bool:
    """Whether a kernel takes a call of torch's scaled_dot_product_attention, whatever was given."""
    if not ordinary(query, key, value) or query is None or key is None or value is None:
        return False
    if type(attn_mask) is not CausalBias and not ordinary(attn_mask):
        return False
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return False
    return serves_attention(query, max(query.shape[-1], value.shape[-1]))


def serves_attention(like: Tensor, head_dim: int) -> bool:
    """Whether a kernel takes attention of tensors on ``like``'s device, of its dtype."""
    dtype = computed_dtype(like)
    return backends.serves(backends.Problem("attention", like.device.type, dtype, head_dim))
