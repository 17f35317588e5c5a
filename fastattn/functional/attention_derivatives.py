"""Every derivative of attention, as one autograd Function.

Let x be (query, key, value, float mask), F(x) = (out, lse), c a cotangent of F, and t_1 ... t_n
directions of x. With D_t the derivative in the direction t, the Function computes

    J_n = D_t1 ... D_tn F(x)                 in the shapes of out and lse
    G_n(c) = grad_x D_t1 ... D_tn <c, F(x)>  in the shapes of x

G_0 is the backward (E6-E11), J_1 forward mode (E12), G_1 the second derivative (E13, E14): these
three are kernels; higher orders are composed from the reference, a few query rows at a time. As
derivatives in several directions commute, the family is closed under differentiation:

    vjp of J_n with cotangent c  of x: G_n(c, t)         of t_i: G_{n-1}(c, t but t_i)
    vjp of G_n with cotangent w  of x: G_{n+1}(c, t, w)  of t_i: G_n(c, t but t_i, w)
                                 of c: J_{n+1}(t, w)
    jvp in the direction (u, c', t')
        of J_n: J_{n+1}(t, u) + sum_i J_n(t with t'_i for t_i)
        of G_n: G_{n+1}(c, t, u) + G_n(c', t) + sum_i G_n(c, t with t'_i for t_i)

The forward's results are passed so that kernels can recompute the probabilities from them; nothing
is differentiated with respect to them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastattn import ops
from fastattn.functional import _batching, higher_order
from fastattn.functional._autograd import add, apply, kernel, save_for_forward
from fastattn.ops import Call, Cotangents, Extras, Inputs, Results, Tangents, split

Group = TypeVar("Group", Cotangents, Tangents)


class Needs(NamedTuple):
    """What is asked of AttentionDerivative: J_n as a whole, and G_n for each input."""

    results: bool = False
    query: bool = False
    key: bool = False
    value: bool = False
    attn_mask: bool = False

    def each(self) -> tuple[bool, ...]:
        """One need for each of (t_out, t_lse, the four gradients)."""
        return (self.results, *self)


@dataclass(frozen=True)
class Request:
    """What AttentionDerivative is asked for. torch.func takes a dataclass as one argument, a
    tuple as a tree of arguments."""

    call: Call
    needs: Needs


class Derivative(NamedTuple):
    """J_n and G_n; None for what is 0 or was not asked for."""

    of_results: Cotangents = Cotangents()
    of_inputs: Tangents = Tangents()

    @classmethod
    def of(cls, needs: Needs, found: Sequence[Tensor | None]) -> Derivative:
        """From the results of AttentionDerivative, which has one for each need."""
        given = iter(found)
        return cls(*split([next(given) if need else None for need in needs.each()],
                          Cotangents, Tangents))  # fmt: skip

    def plus(self, other: Derivative) -> Derivative:
        return Derivative(_sum(self.of_results, other.of_results),
                          _sum(self.of_inputs, other.of_inputs))  # fmt: skip


class AttentionDerivative(torch.autograd.Function):
    """Those of J_n (t_out, t_lse) and of G_n (four gradients) that ``needs`` names;
    n = len(tangents) / 4.

    The tensors are cotangents (of out ``[*, Hq, Sq, Dv]`` and LSE ``[*, Hq, Sq]``), inputs, extras,
    results, and the tangents t_1 ... t_n. All are saved.
    """

    @staticmethod
    def forward(request: Request, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        call, needs = request.call, request.needs
        cotangents, inputs, extras, results, *tangents = _saved(tensors)
        found: Sequence[Any]
        of_inputs = needs[1:]
        if cotangents.out is None and any(of_inputs):
            cotangents = cotangents._replace(out=torch.zeros_like(results.out))
        options, backend = call.options, _backend(call, len(tangents), inputs.query)
        if len(tangents) > 1:
            found = higher_order.derivative(cotangents, inputs, extras, tangents, options, needs)
        elif not tangents:
            grads = kernel(
                ops.attention_backward, cotangents, inputs, extras, results, options,
                list(of_inputs), backend,
            )  # fmt: skip
            found = (None, None, *grads)
        elif not any(of_inputs):
            tangent = kernel(
                ops.attention_jvp, inputs, extras, *tangents, results, options, backend
            )
            found = (*tangent, *(None,) * 4)
        else:
            found = kernel(
                ops.attention_double_backward, cotangents, inputs, extras, *tangents, results,
                options, list(needs), backend,
            )  # fmt: skip
        return tuple(x for x, need in zip(found, needs.each(), strict=True) if need)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.request, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        save_for_forward(ctx, *tensors)

    @staticmethod
    def backward(ctx, *grads):
        c, inputs, extras, results, *t = _saved(ctx.saved_tensors)
        point = Point(ctx.request.call, inputs, extras, results)
        of_c, of_x, of_extras, of_results, *of_t = _saved(ctx.needs_input_grad[1:])
        refuse_slopes(of_extras.slopes, "gradient")
        of_j, w = Derivative.of(ctx.request.needs, grads)
        # J_n: x gets G_n(c, t). G_n: x gets G_{n+1}(c, t, w), and c gets J_{n+1}(t, w).
        found = point.derivative(c, [*t, w], Needs(any(of_c), *of_x))
        grad_c = found.of_results
        grad_x = _sum(point.derivative(of_j, t, Needs(False, *of_x)).of_inputs, found.of_inputs)
        grad_t = []
        for n, asked in enumerate(of_t):
            others = [*t[:n], *t[n + 1 :]]
            # J_n: t_n gets G_{n-1}(c, t but t_n). G_n: t_n gets G_n(c, t but t_n, w).
            first = point.derivative(of_j, others, Needs(False, *asked)).of_inputs
            grad_t += _sum(first, point.derivative(c, [*others, w], Needs(False, *asked)).of_inputs)
        no_grads = (None,) * (len(of_extras) + len(of_results))
        sums = (*grad_c, *grad_x, *no_grads, *grad_t)
        asked = ctx.needs_input_grad[1:]
        return (None, *(x if ask else None for x, ask in zip(sums, asked, strict=True)))

    @staticmethod
    def jvp(ctx, _request, *directions):
        c, inputs, extras, results, *t = _saved(ctx.saved_tensors)
        point = Point(ctx.request.call, inputs, extras, results)
        t_c, u, t_extras, _, *moved = _saved(directions)
        refuse_slopes(t_extras.slopes is not None, "tangent")
        needs = ctx.request.needs
        # J_n: J_{n+1}(t, u). G_n: G_{n+1}(c, t, u) + G_n(c', t).
        total = point.derivative(c, [*t, u], needs)
        total = total.plus(point.derivative(t_c, t, needs._replace(results=False)))
        for n, t_n in enumerate(moved):
            # J_n: J_n(t with t'_n for t_n). G_n: G_n(c, t with t'_n for t_n).
            total = total.plus(point.derivative(c, [*t[:n], t_n, *t[n + 1 :]], needs))
        zeros = (results.out, results.row_max, *inputs)
        return tuple(
            torch.zeros_like(like) if x is None else x
            for x, like, need in zip((*total.of_results, *total.of_inputs), zeros, needs.each(),
                                     strict=True)
            if need
        )  # fmt: skip

    @staticmethod
    def vmap(info, in_dims, request, *tensors):
        return _batching.attention(
            functools.partial(AttentionDerivative.apply, request),
            info.batch_size,
            tensors,
            in_dims[1:],
            _batching.DERIVATIVE,
            whole_mask=request.needs.attn_mask,
        )


class Point:
    """Where derivatives are taken: a call's inputs and results."""

    def __init__(self, call: Call, inputs: Inputs, extras: Extras, results: Results) -> None:
        self.call, self.inputs, self.extras, self.results = call, inputs, extras, results

    def derivative(
        self, cotangents: Cotangents, tangents: Sequence[Tangents], needs: Needs
    ) -> Derivative:
        """J_n and G_n, differentiable."""
        if any(all(x is None for x in t) for t in tangents):
            return Derivative()
        if all(c is None for c in cotangents):
            needs = Needs(needs.results)
        if not any(needs):
            return Derivative()
        flat = [x for t in tangents for x in t]
        found = apply(
            AttentionDerivative, Request(self.call, needs), *cotangents, *self.inputs, *self.extras,
            *self.results, *flat,
        )  # fmt: skip
        return Derivative.of(needs, found)

    def gradients(self, cotangents: Cotangents, needs: Sequence[bool]) -> Tangents:
        """G_0: the gradients of query, key, value and the float mask, differentiable."""
        return self.derivative(cotangents, [], Needs(False, *needs)).of_inputs

    def tangents_of_results(self, tangents: Tangents) -> tuple[Tensor, Tensor]:
        """J_1: the tangents of out and lse, differentiable."""
        found = self.derivative(Cotangents(), [tangents], Needs(results=True)).of_results
        t_out, t_lse = found
        return (
            torch.zeros_like(self.results.out) if t_out is None else t_out,
            torch.zeros_like(self.results.row_max) if t_lse is None else t_lse,
        )


def _saved(tensors: Sequence[Any]) -> list[Any]:
    """AttentionDerivative's arguments after the request, or one item for each of them, in groups:
    cotangents, inputs, extras, results, t_1 ... t_n."""
    parts = split(tensors, Cotangents, Inputs, Extras, Results)
    groups, flat = parts[:4], parts[4:]
    return [*groups, *(Tangents(*flat[n : n + 4]) for n in range(0, len(flat), 4))]


def _sum(a: Group, b: Group) -> Group:
    return type(a)(*map(add, a, b))


def _backend(call: Call, order: int, query: Tensor) -> str:
    """Whose kernels to call: CUDA has kernels for the forward and the first backward alone, and
    Triton's take the other orders."""
    return "triton" if query.is_cuda and order > 0 else call.backend


def refuse_slopes(asked: bool, what: str) -> None:
    """The kernels have no derivative for alibi_slopes."""
    if asked:
        raise RuntimeError(
            f"alibi_slopes: expected no {what}, as the kernels have none for it; use "
            'backend="reference"'
        )
