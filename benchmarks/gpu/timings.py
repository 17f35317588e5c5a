"""Our implementations and torch's, timed case by case; ours are checked first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import ops, reference
from gpu.cases import Attention, Case, Linear, SecondOrder, Step
from gpu.clock import Clock

Row = dict[str, object]
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# ||ours - torch's|| / ||torch's|| before a timing: both round to the dtype.
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


class Timings:
    """``names``: of our implementations, the backend that each is."""

    def __init__(self, clock: Clock, names: dict[str, str]) -> None:
        self._clock, self._device, self._names = clock, clock.device, names

    def measure(self, implementation: str, case: Case) -> list[Row]:
        if isinstance(case, Attention):
            return self._measure_attention(implementation, case)
        if isinstance(case, SecondOrder):
            return self._measure_second_order(case)
        if isinstance(case, Linear):
            return self._measure_linear(implementation, case)
        return self._measure_step(implementation, case)

    def _measure_attention(self, implementation: str, case: Attention) -> list[Row]:
        inputs, mask = self.attention_inputs(case)
        function = self._attention_of(implementation, case.mask == "causal")
        what = "backward" if case.backward else "forward"
        outs = []
        if case.backward:
            outs = [function(*x, mask) for x in inputs]
            cotangents = [torch.randn_like(o) for o in outs]

            def run(n: int) -> object:
                return torch.autograd.grad(outs[n], inputs[n], cotangents[n], retain_graph=True)

        else:

            def run(n: int) -> object:
                with torch.no_grad():
                    return function(*inputs[n], mask)

        row = {"pass": what}
        if implementation in self._names:
            peer = F.scaled_dot_product_attention(*inputs[0], mask, is_causal=case.mask == "causal")
            theirs, ours = [peer], [run(0)]
            if case.backward:
                theirs, ours = torch.autograd.grad(peer, inputs[0], cotangents[0]), run(0)
            row["error"] = self._checked(ours, theirs)
        return [row | self._speed(run, len(inputs), case.flops)]

    def _measure_second_order(self, case: SecondOrder) -> list[Row]:
        error = self._second_order_error(case)
        rows = []
        for what, factor, run in self._second_order_runs(case):
            speed = self._speed(run, 1, factor * case.flops)
            rows.append({"pass": what, "error": error, **speed})
        return rows

    def _second_order_error(self, case: SecondOrder) -> str:
        """Of the kernels on a shorter problem, against the reference in float64."""
        short = case._replace(batch=1, heads=2, seq=min(case.seq, 500))
        ours, theirs = [], []
        for of, wide in ((ours, False), (theirs, True)):
            torch.manual_seed(1)
            q, k, v, t, c = (
                torch.randn(short[:4], dtype=torch.bfloat16, device=self._device) for _ in range(5)
            )
            q, k, v, t, c = (x.double() if wide else x for x in (q, k, v, t, c))

            def attention(q: Tensor, k: Tensor, v: Tensor, wide: bool = wide) -> Tensor:
                causal = short.mask == "causal"
                if wide:
                    return reference.attention(q, k, v, is_causal=causal)[0]
                name = self._names["triton"]
                return fastattn.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, backend=name
                )

            of.append(torch.func.jvp(attention, (q, k, v), (t, v, k))[1])
            leaves = [x.requires_grad_() for x in (q, k, v)]
            first = torch.autograd.grad(attention(*leaves), leaves, c, create_graph=True)
            of += torch.autograd.grad((first[0] * t).sum(), leaves)
        return self._checked(ours, theirs)

    def _second_order_runs(
        self, case: SecondOrder
    ) -> list[tuple[str, float, Callable[[int], object]]]:
        q, k, v, t_q, t_k, t_v, cotangent = (
            torch.randn(case[:4], dtype=torch.bfloat16, device=self._device) for _ in range(7)
        )
        options, backend = ops.Options(case.mask == "causal", case.dim**-0.5), self._names["triton"]
        inputs, tangents, extras = ops.Inputs(q, k, v), ops.Tangents(t_q, t_k, t_v), ops.Extras()
        out, _, *softmax = ops.attention_forward(inputs, extras, options, backend)
        results, cotangents = ops.Results(out, *softmax), ops.Cotangents(cotangent)
        behind = (extras, results, options, [True] * 3 + [False], backend)
        second = (extras, tangents, results, options, [True] * 4 + [False], backend)
        return [
            ("forward", 1.0, lambda _: ops.attention_forward(inputs, extras, options, backend)),
            ("tangent", 2.5, lambda _: ops.attention_jvp(
                inputs, extras, tangents, results, options, backend)),
            ("backward", 2.5, lambda _: ops.attention_backward(cotangents, inputs, *behind)),
            ("second derivative", 6.0,
             lambda _: ops.attention_double_backward(cotangents, inputs, *second)),
        ]  # fmt: skip

    def _measure_linear(self, implementation: str, case: Linear) -> list[Row]:
        size = 2 * (case.rows * (case.n_in + case.n_out) + case.n_in * case.n_out)
        sets = self._clock.sets(size, most=64)
        rows = []
        for what in ("forward", "dX", "dW"):
            inputs = [self._layer(case, what) for _ in range(sets)]
            run = self._linear_run(implementation, case, what, inputs)
            row: Row = {"pass": what}
            if implementation in self._names:
                theirs = self._linear_run("eager", case, what, inputs)(0)
                row["error"] = self._checked(_as_list(run(0)), _as_list(theirs))
            rows.append(row | self._speed(run, sets, case.flops))
        return rows

    def _layer(self, case: Linear, what: str) -> list[Tensor]:
        shapes = ((case.rows, case.n_in), (case.n_out, case.n_in), (case.n_out,))
        scales = (1.0, case.n_in**-0.5, 1.0)
        return [
            torch.randn(shape, dtype=torch.bfloat16, device=self._device)
            .mul_(scale)
            .requires_grad_(what == ("dX" if n == 0 else "dW"))
            for n, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
        ]

    def _linear_run(
        self, implementation: str, case: Linear, what: str, inputs: list[list[Tensor]]
    ) -> Callable[[int], object]:
        def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            if implementation == "eager":
                return F.relu(F.linear(x, w, b))
            return fastattn.linear_relu(x, w, b, backend=self._names[implementation])

        if what == "forward":
            return lambda n: function(*inputs[n])
        outs = [function(*x) for x in inputs]
        cotangent = torch.randn(
            case.rows, case.n_out, dtype=torch.bfloat16, device=self._device,
            generator=torch.Generator(self._device).manual_seed(0),
        )  # fmt: skip
        wanted = slice(0, 1) if what == "dX" else slice(1, 3)
        return lambda n: torch.autograd.grad(
            outs[n], inputs[n][wanted], cotangent, retain_graph=True
        )

    def _measure_step(self, implementation: str, case: Step) -> list[Row]:
        x = torch.randn(case.rows, 784, dtype=torch.bfloat16, device=self._device)
        labels = torch.randint(10, (case.rows,), device=self._device)
        torch.manual_seed(0)
        layers = torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
        net = torch.nn.Sequential(*layers).to(self._device, torch.bfloat16)
        weights, biases = ([getattr(net[n], p) for n in (0, 2)] for p in ("weight", "bias"))
        row: Row = {"pass": "step"}

        def forward() -> Tensor:
            if implementation == "eager":
                return net(x)
            return fastattn.mlp(x, weights, biases, backend=self._names[implementation])

        if implementation in self._names:
            losses = [F.cross_entropy(y, labels) for y in (forward(), net(x))]
            ours, theirs = (torch.autograd.grad(loss, [*weights, *biases]) for loss in losses)
            row["error"] = self._checked(ours, theirs)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(forward(), labels).backward()
            optimizer.step()

        ms = self._clock.wall_ms(step)
        return [row | {"ms": f"{ms:.4f}", "TFLOP/s": f"{case.flops / ms / 1e9:.3g}"}]

    def profile(self, case: Case, what: str) -> None:
        if isinstance(case, Linear):
            inputs = [self._layer(case, what)]
            run = self._linear_run("cuda", case, what, inputs)
        else:
            assert isinstance(case, Attention)
            inputs, mask = self.attention_inputs(case, most=1)
            function = self._attention_of("cuda", case.mask == "causal")
            out = function(*inputs[0], mask)

            def run(n: int) -> object:
                if what == "forward":
                    return function(*inputs[0], mask)
                return torch.autograd.grad(out, inputs[0], out, retain_graph=True)

        for _ in range(4):
            run(0)
        self._clock.synchronize()

    def attention_inputs(
        self, case: Attention, most: int = 8
    ) -> tuple[list[list[Tensor]], Tensor | None]:
        """Sets of q, k, v that together outgrow L2, and the mask."""
        dtype = getattr(torch, case.dtype)
        size = 3 * dtype.itemsize * case.batch * case.heads * case.seq * case.dim
        sets = self._clock.sets(size, most)
        shape = (case.batch, case.heads, case.seq, case.dim)
        inputs = [
            [
                torch.randn(shape, dtype=dtype, device=self._device).requires_grad_(case.backward)
                for _ in range(3)
            ]
            for _ in range(sets)
        ]
        mask = None
        if case.mask == "padding":
            lengths = torch.randint(
                case.seq // 4, case.seq + 1, (case.batch, 1, 1, 1), device=self._device
            )
            mask = torch.arange(case.seq, device=self._device) < lengths
        elif case.mask == "bool":
            mask = torch.rand(case.batch, 1, case.seq, case.seq, device=self._device) > 0.3
        elif case.mask == "bias":
            mask = torch.randn(1, case.heads, case.seq, case.seq, device=self._device).to(dtype)
        return inputs, mask

    def _attention_of(self, implementation: str, causal: bool) -> Callable[..., Tensor]:
        if implementation in self._names:
            name = self._names[implementation]
            return lambda q, k, v, mask: fastattn.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, backend=name
            )

        def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            with sdpa_kernel(SDPA[implementation]):
                return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)

        return sdpa

    def _checked(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> str:
        """The largest relative error; AssertionError beyond the dtype's bound."""
        worst = 0.0
        for a, b in zip(ours, theirs, strict=True):
            a, b = a.detach(), b.detach()
            error = ((a.double() - b.double()).norm() / b.double().norm()).item()
            if not error < BOUNDS[a.dtype]:
                raise AssertionError(f"relative error {error:.2e} against torch's own")
            worst = max(worst, error)
        return f"{worst:.1e}"

    def _speed(self, run: Callable[[int], object], sets: int, flops: float) -> Row:
        ms = self._clock.median_ms(run, sets)
        return {"ms": f"{ms:.4f}", "TFLOP/s": f"{flops / ms / 1e9:.3g}"}


def _as_list(x: object) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)
