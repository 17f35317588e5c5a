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

out, row_max and log_sum are handed on for the kernels, which recompute the probabilities from them;
they are no variables of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import ops
from fastattn.functional import _batching, higher_order
from fastattn.functional._autograd import add, apply, kernel, save_for_forward


@dataclass(frozen=True)
class Call:
    """What of an attention call is not a tensor: to torch.func one argument, no tree."""

    is_causal: bool
    scale: float
    dropout_p: float
    options: ops.Options
    backend: str


@dataclass(frozen=True)
class Request:
    """What is asked of AttentionDerivative: of J_n (t_out, t_lse), and of G_n for query, key,
    value, mask."""

    call: Call
    needs: tuple[bool, ...]


class Results(NamedTuple):
    """What the forward pass left for the kernels behind it."""

    out: Tensor
    row_max: Tensor
    log_sum: Tensor


class Extras(NamedTuple):
    """The tensors of an attention call that have no derivative."""

    seed: Tensor | None = None
    slopes: Tensor | None = None
    starts_q: Tensor | None = None
    starts_k: Tensor | None = None


Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
Tangent = Sequence[Tensor | None]  # of Inputs, None for 0
NOTHING = (None,) * 6
_INPUTS, _SLOPES, _TANGENTS = 2, 10, 13  # where they begin among the Function's tensors


class AttentionDerivative(torch.autograd.Function):
    """What of (J_n: t_out, t_lse; G_n: four gradients) ``needs`` names, n = len(tangents) / 4.

    Saves its inputs: query, key, value, the mask, the forward's results, cotangents and tangents.
    """

    @staticmethod
    def forward(
        request: Request,
        grad_out: Tensor | None,  # [*, Hq, Sq, Dv]
        grad_lse: Tensor | None,  # [*, Hq, Sq]
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        out: Tensor,
        row_max: Tensor,
        log_sum: Tensor,
        seed: Tensor | None,
        slopes: Tensor | None,
        starts_q: Tensor | None,
        starts_k: Tensor | None,
        *tangents: Tensor | None,
    ) -> tuple[Tensor, ...]:
        call, needs = request.call, request.needs
        order = len(tangents) // 4
        extras = Extras(seed, slopes, starts_q, starts_k)
        inputs, results = (query, key, value, attn_mask), (out, row_max, log_sum)
        if order > 1:
            found = higher_order.derivative(
                (grad_out, grad_lse),
                inputs,
                [tangents[n : n + 4] for n in range(0, 4 * order, 4)],
                needs,
                **_reference_options(call, extras),
            )
            return tuple(x for x, need in zip(found, (needs[0], *needs), strict=True) if need)
        args = (seed, call.is_causal, call.scale, call.dropout_p)
        rest = (slopes, starts_q, starts_k, call.options, _backend(call, order))
        if grad_out is None and any(needs[1:]):
            grad_out = torch.zeros_like(out)
        if order == 0:
            found = kernel(
                ops.attention_backward,
                grad_out,
                grad_lse,
                *inputs,
                *results,
                *args,
                list(needs[1:]),
                *rest,
            )
            return tuple(x for x, need in zip(found, needs[1:], strict=True) if need)
        if not any(needs[1:]):
            return tuple(kernel(ops.attention_jvp, *inputs, *tangents, *results, *args, *rest))
        found = kernel(
            ops.attention_double_backward,
            grad_out,
            grad_lse,
            *inputs,
            *tangents,
            *results,
            *args,
            list(needs),
            *rest,
        )
        return tuple(x for x, need in zip(found, (needs[0], *needs), strict=True) if need)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.request, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        save_for_forward(ctx, *tensors)

    @staticmethod
    def backward(ctx, *grads):
        cotangents = ctx.saved_tensors[:2]
        point, tangents = _Point.split(ctx.request.call, ctx.saved_tensors)
        of_j, of_g = _by_output(ctx.request.needs, grads)
        asked = ctx.needs_input_grad[1:]
        refuse_slopes(asked[_SLOPES], "gradient")
        sums: list[Tensor | None] = [None] * len(asked)

        def take(place: int, found: Sequence[Tensor | None]) -> None:
            sums[place : place + len(found)] = map(add, sums[place : place + len(found)], found)

        for n in range(len(tangents) + 1):  # of the inputs, then of each tangent
            place = _TANGENTS + 4 * (n - 1) if n else _INPUTS
            rest = tangents[: n - 1] + tangents[n:] if n else tangents
            needs = tuple(asked[place : place + 4])
            if any(x is not None for x in of_g):
                with_cotangents = n == 0 and any(asked[:2])
                found = point.derivative(cotangents, [*rest, of_g], (with_cotangents, *needs))
                take(0, found[:2])
                take(place, found[2:])
            if any(x is not None for x in of_j):
                take(place, point.derivative(of_j, rest, (False, *needs))[2:])
        return (None, *(x if ask else None for x, ask in zip(sums, asked, strict=True)))

    @staticmethod
    def jvp(ctx, _request, *directions):
        refuse_slopes(directions[_SLOPES] is not None, "tangent")
        cotangents, needs = ctx.saved_tensors[:2], ctx.request.needs
        point, tangents = _Point.split(ctx.request.call, ctx.saved_tensors)
        of_inputs = directions[_INPUTS : _INPUTS + 4]
        total = point.derivative(cotangents, [*tangents, of_inputs], needs)
        found = point.derivative(directions[:2], tangents, (False, *needs[1:]))
        total = list(map(add, total, found))
        for n in range(len(tangents)):
            moved = list(tangents)
            moved[n] = directions[_TANGENTS + 4 * n :][:4]
            total = list(map(add, total, point.derivative(cotangents, moved, needs)))
        return tuple(
            point.zeros_like_result(n) if x is None else x
            for n, (x, need) in enumerate(zip(total, (needs[0], *needs), strict=True))
            if need
        )

    @staticmethod
    def vmap(info, in_dims, request, *tensors):
        return _batching.attention(
            functools.partial(AttentionDerivative.apply, request),
            info.batch_size,
            tensors,
            in_dims[1:],
            _batching.DERIVATIVE,
            whole_mask=request.needs[4],
        )


class _Point:
    """Where derivatives are taken: a call's inputs and results."""

    def __init__(self, call: Call, inputs: Inputs, results: Results, extras: Extras) -> None:
        self.call, self.inputs, self.results, self.extras = call, inputs, results, extras

    @staticmethod
    def split(call: Call, saved: Sequence[Tensor | None]) -> tuple[_Point, list[Tangent]]:
        """From what AttentionDerivative saves: the point, and the tangents by fours."""
        inputs, results, extras = tuple(saved[2:6]), Results(*saved[6:9]), Extras(*saved[9:13])
        tangents = saved[13:]
        fours = [tuple(tangents[n : n + 4]) for n in range(0, len(tangents), 4)]
        return _Point(call, inputs, results, extras), fours

    def derivative(
        self,
        cotangents: tuple[Tensor | None, Tensor | None],
        tangents: Sequence[Tangent],
        needs: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """(t_out, t_lse, gradients of query, key, value, mask); None for what is 0 or not
        needed."""
        if any(all(x is None for x in t) for t in tangents):
            return NOTHING
        if all(c is None for c in cotangents):
            needs = (needs[0], False, False, False, False)
        if not any(needs):
            return NOTHING
        flat = [x for t in tangents for x in t]
        found = iter(
            apply(
                AttentionDerivative, Request(self.call, tuple(needs)), *cotangents, *self.inputs,
                *self.results, *self.extras, *flat,
            )
        )  # fmt: skip
        return [next(found) if need else None for need in (needs[0], *needs)]

    def zeros_like_result(self, n: int) -> Tensor:
        return torch.zeros_like((*self.results[:2], *self.inputs)[n])


def _by_output(
    needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Cotangents of J_n and of G_n; None for outputs that are not there."""
    given = iter(grads)
    by_output = [next(given) if need else None for need in (needs[0], *needs)]
    return tuple(by_output[:2]), tuple(by_output[2:])


def _backend(call: Call, order: int) -> str:
    """The backend of a derivative: cuda has kernels for the first backward alone."""
    return "triton" if call.backend == "cuda" and order > 0 else call.backend


def _reference_options(call: Call, extras: Extras) -> dict[str, object]:
    left, right = call.options.window_left, call.options.window_right
    return {
        "is_causal": call.is_causal,
        "scale": call.scale,
        "dropout_p": call.dropout_p,
        "window_size": (left, right),
        "softcap": call.options.softcap,
        "alibi_slopes": extras.slopes,
        "seed": extras.seed,
        "starts_q": extras.starts_q,
        "starts_k": extras.starts_k,
    }


def refuse_slopes(asked: bool, what: str) -> None:
    """The kernels have no derivative for alibi_slopes."""
    if asked:
        raise RuntimeError(
            f"alibi_slopes: expected no {what}, as the kernels have none for it; use "
            'backend="reference"'
        )


def gradients(
    call: Call,
    inputs: Inputs,
    results: Results,
    extras: Extras,
    cotangents: tuple[Tensor | None, Tensor | None],
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """G_0: the gradients of query, key, value and the float mask, differentiable."""
    return _Point(call, inputs, results, extras).derivative(cotangents, [], (False, *needs))[2:]


def tangents_of_results(
    call: Call,
    inputs: Inputs,
    results: Results,
    extras: Extras,
    tangent: Tangent,
) -> tuple[Tensor, Tensor]:
    """J_1: the tangents of out and lse, differentiable."""
    point = _Point(call, inputs, results, extras)
    needs = (True, False, False, False, False)
    found = point.derivative((None, None), [tangent], needs)[:2]
    return tuple(point.zeros_like_result(n) if x is None else x for n, x in enumerate(found))
