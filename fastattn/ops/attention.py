"""Attention ops: query ``[*, Hq, Sq, D]``, key ``[*, Hk, Sk, D]``, value ``[*, Hk, Sk, Dv]``.

An attn_mask has query's rank. Beside starts_q and starts_k query is ``[1, Hq, tokens, D]``.
``backend`` is "native", the C++ kernels of the tensors' device, or "triton".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn._call import NATIVE, Cotangents, Extras, Inputs, Options, Results, Tangents, split
from fastattn.ops import schemas


def attention_forward(
    inputs: Inputs, extras: Extras, options: Options, backend: str = NATIVE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out ``[*, Hq, Sq, Dv]``, LSE ``[*, Hq, Sq]``, and the LSE's parts row_max and log_sum."""
    op = _namespace(backend).attention_forward
    return op(*inputs, *_in_lse_dtype(extras, inputs), *options)


def attention_backward(
    cotangents: Cotangents,
    inputs: Inputs,
    extras: Extras,
    results: Results,
    options: Options,
    needs: Sequence[bool],
    backend: str = NATIVE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the float mask; one that is not needed has shape
    ``[0]``."""
    op = _namespace(backend).attention_backward
    return op(*cotangents, *inputs, *_in_lse_dtype(extras, inputs), *results, *options, needs)


def attention_jvp(
    inputs: Inputs,
    extras: Extras,
    tangents: Tangents,
    results: Results,
    options: Options,
    backend: str = NATIVE,
) -> tuple[Tensor, Tensor]:
    """The tangents of out and LSE."""
    op = _namespace(backend).attention_jvp
    return op(*inputs, *_in_lse_dtype(extras, inputs), *tangents, *results, *options)


def attention_double_backward(
    cotangents: Cotangents,
    inputs: Inputs,
    extras: Extras,
    tangents: Tangents,
    results: Results,
    options: Options,
    needs: Sequence[bool],
    backend: str = NATIVE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tangents of out and LSE, and attention_backward's derivatives in the direction of the
    tangents; needs: of (the former, query, key, value, float mask), and what is not needed has
    shape ``[0]``."""
    op = _namespace(backend).attention_double_backward
    extras = _in_lse_dtype(extras, inputs)
    return op(*cotangents, *inputs, *extras, *tangents, *results, *options, needs)


def _namespace(backend: str) -> Any:
    return torch.ops.fastattn_triton if backend == "triton" else torch.ops.fastattn


def _in_lse_dtype(extras: Extras, inputs: Inputs) -> Extras:
    """The slopes in the dtype that kernels read."""
    slopes = extras.slopes
    if slopes is None:
        return extras
    dtype = _accumulator(inputs.query)
    return extras if slopes.dtype == dtype else extras._replace(slopes=slopes.to(dtype))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- what the ops return for fake tensors ---------------------------------------------------------


def _rows(x: Tensor, head_dim: int, extras: Extras) -> Tensor:
    """Packed tokens keep the layout [tokens, heads, dim]."""
    if extras.starts_q is not None:
        batch, heads, tokens, _ = x.shape
        return x.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)
    return x.new_empty((*x.shape[:-1], head_dim))


def _gradients(inputs: Inputs, extras: Extras, needs: Sequence[bool]) -> list[Tensor]:
    mask, absent = inputs.attn_mask, (0,)
    return [
        *(
            _rows(x, x.shape[-1], extras) if need else inputs.query.new_empty(absent)
            for x, need in zip(inputs[:3], needs[:3], strict=True)
        ),
        inputs.query.new_empty(mask.shape if mask is not None and needs[3] else absent),
    ]


def _fake_forward(*args):
    inputs, extras, *_ = split(args, Inputs, Extras)
    query, dtype = inputs.query, _accumulator(inputs.query)
    out = _rows(query, inputs.value.shape[-1], extras)
    return out, *(query.new_empty(query.shape[:-1], dtype=dtype) for _ in range(3))


def _fake_backward(_grad_out, _grad_lse, *args):
    inputs, extras, *_, needs = split(args, Inputs, Extras)
    return tuple(_gradients(inputs, extras, needs))


def _fake_jvp(*args):
    inputs, extras, *_ = split(args, Inputs, Extras)
    query = inputs.query
    t_lse = query.new_empty(query.shape[:-1], dtype=_accumulator(query))
    return _rows(query, inputs.value.shape[-1], extras), t_lse


def _fake_double_backward(_grad_out, _grad_lse, *args):
    inputs, extras, *_, needs = split(args, Inputs, Extras)
    t_out, t_lse = _fake_jvp(*args)
    if not needs[0]:
        t_out, t_lse = t_out.new_empty((0,)), t_lse.new_empty((0,))
    return t_out, t_lse, *_gradients(inputs, extras, needs[1:])


_FAKES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "attention_forward": _fake_forward,
    "attention_backward": _fake_backward,
    "attention_jvp": _fake_jvp,
    "attention_double_backward": _fake_double_backward,
}

for _name, _fake in _FAKES.items():
    for _ns in schemas.NAMESPACES:
        torch.library.register_fake(f"{_ns}::{_name}", _fake)
