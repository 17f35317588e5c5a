"""Cases of attention with tangents and cotangents, and what the oracle's own derivatives are:
``torch.func.jvp`` and autograd, twice, of ``reference.attention`` in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn import ops, reference
from fastattn.testing import make_mask

NAMES = ("query", "key", "value", "mask")
ALL = (True, True, True, True)


class Case:
    """A call: the operands ``inputs`` by NAMES (the mask may be None or bool) and its options."""

    def __init__(self, shape, options: dict, mask_kind: str, dtype, device, seeds: int = 1):
        batch, heads_q, heads_k, seq_q, seq_k, dim, dim_v = shape
        self.dtype, self.options = dtype, {"scale": dim**-0.5} | options
        q = torch.randn(batch, seq_q, heads_q, dim + 3, dtype=dtype, device=device)
        q = q[..., 3:].transpose(1, 2)
        k = torch.randn(batch, seq_k, heads_k, dim, dtype=dtype, device=device).transpose(1, 2)
        v = torch.randn(batch, heads_k, seq_k, dim_v, dtype=dtype, device=device)
        mask = make_mask(mask_kind, (batch, heads_q, seq_q, seq_k), dtype, device)
        self.inputs = [q, k, v, mask]
        self.differentiable = [x is not None and x.dtype == dtype for x in self.inputs]
        if options.get("alibi_slopes"):
            self.options["alibi_slopes"] = torch.rand(batch, heads_q, device=device)
        self.seed = None
        if "dropout_p" in options:
            self.seed = torch.arange(seeds, device=device) * 7**20 - (2**40) - 12345

    def tangents(self, present=ALL) -> list[Tensor | None]:
        return [
            torch.randn(x.shape, dtype=x.dtype, device=x.device) if here and able else None
            for x, able, here in zip(self.inputs, self.differentiable, present, strict=True)
        ]

    @property
    def numbers(self) -> ops.Options:
        given = {k: x for k, x in self.options.items() if k in ops.Options._fields}
        left, right = self.options.get("window_size", (-1, -1))
        return ops.Options(left=left, right=right)._replace(**given)

    @property
    def extras(self) -> ops.Extras:
        return ops.Extras(self.options.get("alibi_slopes"), self.seed)

    def op(self, name: str, *before, between=(), after=()) -> tuple[Tensor, ...]:
        return getattr(torch.ops.fastattn_triton, name)(
            *before, *self.inputs, *self.extras, *between, *self.numbers, *after
        )

    def oracle(self, *inputs) -> tuple[Tensor, Tensor]:
        """``reference.attention``, on each seed's share of the batch."""
        shares = 1 if self.seed is None else self.seed.numel()
        batch = inputs[0].shape[0]

        def share(x: Tensor | None, n: int) -> Tensor | None:
            return x.chunk(shares)[n] if x is not None and x.shape[0] == batch else x

        results = [
            reference.attention(
                *(share(x, n) for x in inputs),
                **self.options | {"alibi_slopes": share(self.options.get("alibi_slopes"), n)},
                seed=None if self.seed is None else self.seed[n],
            )
            for n in range(shares)
        ]
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    def wide(self) -> list[Tensor | None]:
        return [
            x.detach().double() if able else x
            for x, able in zip(self.inputs, self.differentiable, strict=True)
        ]

    def _of_differentiable(self, wide: list):
        """The oracle as a function of the inputs that have a derivative, and these."""
        places = [n for n, able in enumerate(self.differentiable) if able]

        def function(*some):
            inputs = list(wide)
            for place, x in zip(places, some, strict=True):
                inputs[place] = x
            return self.oracle(*inputs)

        return function, places

    def expected_jvp(self, tangents) -> tuple[Tensor, Tensor]:
        wide = self.wide()
        function, places = self._of_differentiable(wide)
        primals = tuple(wide[n] for n in places)
        moves = tuple(
            torch.zeros_like(wide[n]) if tangents[n] is None else tangents[n].double()
            for n in places
        )
        _, (t_out, t_lse) = torch.func.jvp(function, primals, moves)
        return t_out, t_lse

    def expected_double(self, grad_out, grad_lse, tangents) -> list[Tensor | None]:
        """The gradients of the sum of tangent * gradient, by NAMES."""
        wide = self.wide()
        function, places = self._of_differentiable(wide)
        leaves = [wide[n].requires_grad_() for n in places]
        cotangents = [g.double() for g in (grad_out, grad_lse) if g is not None]
        outputs = function(*leaves)[: len(cotangents)]
        grads = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
        total = sum(
            (grad * tangents[n].double()).sum()
            for n, grad in zip(places, grads, strict=True)
            if tangents[n] is not None
        )
        seconds = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        results = [None] * len(NAMES)
        for n, second in zip(places, seconds, strict=True):
            results[n] = second
        return results


def nan_where(x: Tensor, rows: Tensor, value: float = math.nan) -> Tensor:
    """x ``[*, S, D]`` with some rows replaced."""
    x = x.clone()
    x[..., rows, :] = value
    return x
