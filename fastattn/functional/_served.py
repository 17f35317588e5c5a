"""Is this an ordinary call, one that a kernel may take in place of torch's own operations?

A drop-in asks before each call. Where the answer is no, it runs torch's code, with torch's results
and torch's errors. Nothing here raises and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._device import DeviceContext

from fastattn import backends


def unobserved() -> bool:
    """Whether nobody watches or records torch's operations: no ``torch.jit.trace``, no dispatch
    mode (``make_fx``, fake tensors, counters of operations), no torch function mode but the one
    that sets the default device."""
    if torch.compiler.is_compiling():
        return True  # Dynamo has guards of its own
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
        return False
    functions = torch._C._len_torch_function_stack()
    return not functions or all(
        type(torch._C._get_function_stack_at(i)) is DeviceContext for i in range(functions)
    )


def ordinary(*tensors: object, exported: bool = False) -> bool:
    """Whether each is None or a dense strided tensor with data: no subclass, and no sparse, nested
    or meta tensor. ``exported``: the fake tensors of ``torch.export`` will do."""
    kinds = (Tensor, torch.nn.Parameter)
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


def serves_layers(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    exported: bool = False,
) -> bool:
    """Whether a kernel takes ``linear_relu`` or ``mlp`` with these. Shapes, dtypes and devices that
    do not fit together are torch's to refuse, or to broadcast."""
    tensors = [input, *weights, *(b for b in biases if b is not None)]
    if (
        input is None
        or not ordinary(*tensors, exported=exported)
        or input.dim() == 0
        or not _together(tensors)
    ):
        return False
    width = input.shape[-1]
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dim() != 2 or weight.shape[1] != width:
            return False
        width = weight.shape[0]
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != width):
            return False
    problem = backends.linear_problem("linear_relu", input, weights)
    return _has_kernel(problem._replace(dtype=_dtype(input)))


def product_wins(input: Tensor, weight: Tensor) -> bool:
    """Whether the kernels' product of a Linear is faster than torch's. Measured in pairs, forward
    and backward: 2 to 17 times where torch has no product in the dtype, from 8 rows on; torch's is
    as fast or faster with fewer rows and in the other dtypes."""
    rows = input.numel() // max(1, input.shape[-1])
    return rows >= 16 and min(weight.shape) >= 32 and lacks_product(_dtype(input), input.device)


def lacks_product(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies matrices of the dtype without a library made for this processor."""
    return device.type == "cpu" and dtype in _LACKING


def _lacking() -> frozenset[torch.dtype]:
    try:
        has = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
    except AttributeError:  # a torch without oneDNN: nothing was measured there
        return frozenset()
    return frozenset(dtype for dtype, there in has.items() if not there)


_LACKING = _lacking()


def serves_attention(like: Tensor, head_dim: int) -> bool:
    """Whether a kernel takes attention of tensors on ``like``'s device, of its dtype."""
    return _has_kernel(backends.Problem("attention", like.device.type, _dtype(like), head_dim))


def _together(tensors: Sequence[Tensor]) -> bool:
    """Whether they are on one device and of one dtype, or of dtypes that autocast makes one."""
    first = tensors[0]
    if any(x.device != first.device for x in tensors):
        return False
    if all(x.dtype == first.dtype for x in tensors):
        return True
    return _autocasts(first) and all(
        x.is_floating_point() and x.dtype != torch.float64 for x in tensors
    )


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the call is computed."""
    if x.is_floating_point() and x.dtype != torch.float64 and _autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _has_kernel(problem: backends.Problem) -> bool:
    names = ("cpu",) if problem.device == "cpu" else ("cuda", "triton")
    return any(not backends.default_reasons(problem, name) for name in names)
