"""Small problems of linear layers, activations and norms, solved by the kernels and by the float64
reference. The kernels are called as ops, as those of attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastattn import ops, reference
from fastattn.verification.problems import Case, Comparison, Device, Random


def _passes(out: Tensor) -> Tensor:
    return ~(out <= 0)


def _unpacked(bits: Tensor, like: Tensor) -> Tensor:
    """The ReLU's bits ``[M, ceil(N / 8)]`` as 0 and 1 in the shape of the output ``[M, N]``."""
    places = torch.arange(8, dtype=torch.uint8, device="cpu")
    return ((bits[..., None] >> places) & 1).flatten(-2)[:, : like.shape[-1]]


def solve_linear(part: str, at: Device, case: Case) -> Iterator[Comparison]:
    """One layer. Which outputs pass the ReLU is taken from the kernel: one that is 0 but for
    rounding may be on either side of it."""
    random, width = Random(case.dtype), 2 * case.head_dim + 9
    x, w, b = random(case.rows, 72), random(width, 72), random(width)
    grad, tangents = random(case.rows, width), [random(*t.shape) for t in (x, w, b)]
    on_x, on_w, on_b, on_grad = (t.to(at.device) for t in (x, w, b, grad))
    on_t_x, on_t_w, on_t_b = (t.to(at.device) for t in tangents)

    def kernels() -> dict[str, Tensor]:
        out, bits = ops.linear_relu_forward(on_x, on_w, on_b, at.backend)
        if part == "tangent":
            t_out = ops.linear_relu_jvp(on_x, on_w, bits, on_t_x, on_t_w, on_t_b, at.backend)
            return {"out": out, "bits": bits, "t_out": t_out}
        grads = ops.linear_relu_backward(on_grad, on_x, on_w, bits, [True] * 3, at.backend)
        return {"out": out, "bits": bits, **dict(zip(("dx", "dw", "db"), grads, strict=True))}

    actual = at.run(kernels)
    x, w, b, grad, *tangents = (t.double() for t in (x, w, b, grad, *tangents))
    passes = _passes(actual["out"])
    yield Comparison("out", actual["out"], reference.linear_relu(x, w, b))
    yield Comparison("bits", _unpacked(actual["bits"], passes), passes.double())
    if part == "tangent":
        expected = {"t_out": reference.linear_relu_jvp(x, w, passes, *tangents)}
    else:
        grads = reference.linear_relu_backward(grad, x, w, passes)
        expected = dict(zip(("dx", "dw", "db"), grads, strict=True))
    for name, y in expected.items():
        yield Comparison(name, actual[name], y)


def solve_mlp(at: Device, case: Case) -> Iterator[Comparison]:
    """Three layers; which hidden activations pass is taken from the kernel, as above."""
    random, widths = Random(case.dtype), (72, 2 * case.head_dim, 40, 10)
    x, grad = random(case.rows, widths[0]), random(case.rows, widths[-1])
    weights = [random(n, m) / m**0.5 for m, n in itertools.pairwise(widths)]
    biases = [random(n) for n in widths[1:]]
    on_x, on_grad = x.to(at.device), grad.to(at.device)
    on_weights, on_biases = ([t.to(at.device) for t in ts] for ts in (weights, biases))
    names = ("out", "h1", "h2", "dx", "dw1", "dw2", "dw3", "db1", "db2", "db3", "inference")

    def kernels() -> dict[str, Tensor]:
        out, *hidden = ops.mlp_forward(on_x, on_weights, on_biases)
        grads = ops.mlp_backward(on_grad, on_x, on_weights, hidden, [True] * 7)
        inference = ops.mlp_inference(on_x, on_weights, on_biases)
        return dict(zip(names, (out, *hidden, *grads, inference), strict=True))

    actual = at.run(kernels)
    x, grad, *tensors = (t.double() for t in (x, grad, *weights, *biases))
    weights, biases = tensors[:3], tensors[3:]
    inputs = [x]
    for n in range(2):
        inputs.append(reference.linear_relu(inputs[-1], weights[n], biases[n]))
    out = torch.nn.functional.linear(inputs[2], weights[2], biases[2])
    expected = {"out": out, "inference": out, "h1": inputs[1], "h2": inputs[2]}
    passes = [_passes(actual["h1"]), _passes(actual["h2"]), torch.ones_like(out, dtype=torch.bool)]
    for n in (2, 1, 0):
        grad, dw, db = reference.linear_relu_backward(grad, inputs[n], weights[n], passes[n])
        expected |= {f"dw{n + 1}": dw, f"db{n + 1}": db}
    expected["dx"] = grad
    for name, y in expected.items():
        yield Comparison(name, actual[name], y)


def _gradients(
    call: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The reference's outputs, then the gradients of ``tensors``, by autograd in float64."""
    with torch.enable_grad():
        leaves = [t.detach().double().requires_grad_() for t in tensors]
        outs = call(*leaves)
        grads = torch.autograd.grad(outs, leaves, [c.double() for c in cotangents])
    return *(out.detach() for out in outs), *grads


def _seeds() -> Tensor:
    """Dropout's, each for one half of the rows."""
    return torch.tensor([5, 1234567890123], dtype=torch.int64, device="cpu")


def solve_linear_layers(at: Device, case: Case) -> Iterator[Comparison]:
    """A layer with GELU and dropout, two layers on one input, and a gated product."""
    yield from _solve_activated_layer(at, case)
    yield from _solve_two_layers(at, case)
    yield from _solve_gated_product(at, case)


def _solve_activated_layer(at: Device, case: Case) -> Iterator[Comparison]:
    random, rows, width = Random(case.dtype), case.rows // 2 * 2, 2 * case.head_dim + 9
    x, w, b, grad = random(rows, 72), random(width, 72), random(width), random(rows, width)
    w, p, seeds = w / 8, 0.25, _seeds()
    on_x, on_w, on_b, on_grad, on_seeds = (t.to(at.device) for t in (x, w, b, grad, seeds))

    def kernels() -> dict[str, Tensor]:
        out, slope = ops.linear_forward(on_x, [on_w], [on_b], "gelu", p, on_seeds, True)
        grads = ops.linear_backward([on_grad], on_x, [on_w], [slope], p, [True] * 3)
        return dict(zip(("out", "slope", "dx", "dw", "db"), (out, slope, *grads), strict=True))

    def activated(z: Tensor) -> list[Tensor]:
        return [reference.activation_dropout(z, activation="gelu", dropout_p=p, seed=seeds)]

    def call(x: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
        return activated(reference.linear(x, w, b))

    actual = at.run(kernels)
    out, *grads = _gradients(call, (x, w, b), [grad])
    sums = reference.linear(x.double(), w.double(), b.double())
    _, slope = _gradients(activated, [sums], [torch.ones_like(sums)])
    for name, y in zip(actual, (out, slope, *grads), strict=True):
        yield Comparison(f"{name} (GELU, dropout)", actual[name], y)


def _solve_two_layers(at: Device, case: Case) -> Iterator[Comparison]:
    random, widths = Random(case.dtype), (2 * case.head_dim + 9, case.head_dim)
    x, weights = random(case.rows, 72), [random(n, 72) for n in widths]
    biases, grads = [random(n) for n in widths], [random(case.rows, n) for n in widths]
    on_x = x.to(at.device)
    on_weights, on_biases, on_grads = (
        [t.to(at.device) for t in ts] for ts in (weights, biases, grads)
    )
    names = ("out1", "out2", "dx", "dw1", "dw2", "db1", "db2")

    def kernels() -> dict[str, Tensor]:
        out1, out2, *saved = ops.linear_forward(on_x, on_weights, on_biases, None, 0.0, None, True)
        found = ops.linear_backward(on_grads, on_x, on_weights, saved, 0.0, [True] * 5)
        return dict(zip(names, (out1, out2, *found), strict=True))

    def call(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> list[Tensor]:
        return [reference.linear(x, w1, b1), reference.linear(x, w2, b2)]

    actual = at.run(kernels)
    for name, y in zip(names, _gradients(call, (x, *weights, *biases), grads), strict=True):
        yield Comparison(f"{name} (two weights)", actual[name], y)


def _solve_gated_product(at: Device, case: Case) -> Iterator[Comparison]:
    random, width = Random(case.dtype), 2 * case.head_dim + 9
    x, grad = random(case.rows, 72), random(case.rows, width)
    w_gate, w, b_gate, b = (random(width, *n) for n in ((72,), (72,), (), ()))
    tensors = (x, w_gate / 8, w / 8, b_gate, b)
    on_x, on_gate, on_w, on_b_gate, on_b = (t.to(at.device) for t in tensors)
    on_grad = grad.to(at.device)
    names = ("out", "of_gate", "of_up", "dx", "dw_gate", "dw", "db_gate", "db")

    def kernels() -> dict[str, Tensor]:
        out, *saved = ops.gated_linear_forward(on_x, on_gate, on_w, on_b_gate, on_b, "silu", True)
        grads = ops.linear_backward([on_grad] * 2, on_x, [on_gate, on_w], saved, 0.0, [True] * 5)
        return dict(zip(names, (out, *saved, *grads), strict=True))

    def activated(z: Tensor) -> list[Tensor]:
        return [reference.activation_dropout(z, activation="silu")]

    def call(*tensors: Tensor) -> list[Tensor]:
        return [reference.gated_linear(*tensors, activation="silu")]

    actual = at.run(kernels)
    out, *grads = _gradients(call, tensors, [grad])
    x, w_gate, w, b_gate, b = (t.double() for t in tensors)
    gate, up = reference.linear(x, w_gate, b_gate), reference.linear(x, w, b)
    of_up, of_gate = _gradients(activated, [gate], [up])
    for name, y in zip(names, (out, of_gate, of_up, *grads), strict=True):
        yield Comparison(f"{name} (gated)", actual[name], y)


def solve_activation(
    calls: Sequence[tuple[str | None, float]], at: Device, case: Case
) -> Iterator[Comparison]:
    """``calls``: the activations and dropout's probabilities."""
    random, rows, width = Random(case.dtype), case.rows // 2 * 2, 2 * case.head_dim + 9
    x, grad, seeds = random(rows, width), random(rows, width), _seeds()
    on_x, on_grad, on_seeds = (t.to(at.device) for t in (x, grad, seeds))
    for activation, p in calls:

        def kernels(activation: str | None = activation, p: float = p) -> dict[str, Tensor]:
            options = (activation, p, on_seeds if p > 0.0 else None, at.backend)
            out = ops.activation_forward(on_x, *options)
            return {"out": out, "dx": ops.activation_backward(on_grad, on_x, *options)}

        def call(x: Tensor, activation: str | None = activation, p: float = p) -> list[Tensor]:
            return [reference.activation_dropout(x, activation=activation, dropout_p=p, seed=seeds)]

        actual = at.run(kernels)
        for name, y in zip(actual, _gradients(call, [x], [grad]), strict=True):
            yield Comparison(f"{name} ({activation}, dropout {p})", actual[name], y)


def solve_norm(at: Device, case: Case) -> Iterator[Comparison]:
    """LayerNorm with dropout by two seeds, and RMSNorm without, of a residual sum."""
    random, rows, width = Random(case.dtype), case.rows // 2 * 2, 2 * case.head_dim + 9
    x, residual, weight, bias = (
        random(rows, width), random(rows, width), random(width), random(width),
    )  # fmt: skip
    grad_out, grad_sum = random(rows, width), random(rows, width)
    seeds = _seeds()
    on = [t.to(at.device) for t in (x, residual, weight, bias, grad_out, grad_sum, seeds)]

    for rms, p in ((False, 0.25), (True, 0.0)):

        def kernels(rms: bool = rms, p: float = p) -> dict[str, Tensor]:
            on_x, on_residual, on_weight, on_bias, on_grad_out, on_grad_sum, on_seeds = on
            out, total, mean, rstd = ops.dropout_add_norm_forward(
                on_x, on_residual, on_weight, on_bias, on_seeds, p, 1e-5, rms, at.backend
            )
            grads = ops.dropout_add_norm_backward(
                on_grad_out, on_grad_sum, total, on_weight, mean, rstd, on_seeds, p, rms,
                [True] * 4, at.backend,
            )  # fmt: skip
            named = dict(zip(("dx", "dr", "dw", "db"), grads, strict=True))
            return {"out": out, "sum": total, **named}

        actual = at.run(kernels)
        wide, b = weight.double(), bias.double()
        out, total = reference.dropout_add_norm(
            x.double(), residual.double(), wide, b, seeds, dropout_p=p, rms=rms
        )
        grads = reference.dropout_add_norm_backward(
            grad_out.double(), grad_sum.double(), total, wide, seeds, dropout_p=p, rms=rms
        )
        expected = {
            "out": out,
            "sum": total,
            **dict(zip(("dx", "dr", "dw", "db"), grads, strict=True)),
        }
        for name, y in expected.items():
            yield Comparison(f"{name} ({'RMSNorm' if rms else 'LayerNorm'})", actual[name], y)
