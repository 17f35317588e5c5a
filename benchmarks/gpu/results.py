"""The results of one kernel of the CUDA library, and what they should be.

The ops are dispatched by device: on a CPU the same calls reach the C++ kernels.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastattn import ops, reference
from gpu.smoke import KERNELS, AttentionSize, Case, LinearSize, MlpSize

Tensors = dict[str, Tensor]


class Results:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def of(self, kernel: str, case: Case) -> dict[str, tuple[NDArray, NDArray]]:
        run = {"attention": self._attention, "linear": self._linear, "mlp": self._mlp}
        actual, expected = run[KERNELS[kernel].op](kernel, case)
        return {
            name: (actual[name].float().cpu().numpy(), expected[name].double().cpu().numpy())
            for name in KERNELS[kernel].tensors
        }

    def _attention(self, name: str, case: Case) -> tuple[Tensors, Tensors]:
        """The backward gets the reference's output and LSE: each kernel is judged alone. As scores
        are small here, all of the LSE may be the logarithm of the sum."""
        kernel, size = KERNELS[name], case.size
        assert isinstance(size, AttentionSize)
        random = functools.partial(
            torch.randn, dtype=getattr(torch, case.dtype), device=self.device
        )
        q, cotangent = (
            random(size.batch, size.heads_q, size.seq_q, kernel.head_dim) for _ in range(2)
        )
        k, v = (random(size.batch, size.heads_k, size.seq_k, kernel.head_dim) for _ in range(2))
        mask = None
        if kernel.masked:
            mask = torch.rand(size.batch, 1, 1, size.seq_k, device=self.device) > 0.3
            mask[..., size.seq_k // 2 :] &= torch.rand((), device=self.device) > 2.0
        wide = [x.double() for x in (q, k, v)]
        out, lse = reference.attention_forward(*wide, mask, is_causal=size.causal)
        options = ops.Options(size.causal, kernel.head_dim**-0.5)
        inputs, extras = ops.Inputs(q, k, v, mask), ops.Extras()
        if not kernel.backward:
            actual = ops.attention_forward(inputs, extras, options)
            names = ("out", "lse", "row_max", "log_sum")
            return dict(zip(names, actual, strict=True)), {"out": out, "lse": lse}
        rounded, empty = out.to(q.dtype), lse == -torch.inf
        row_max = torch.zeros_like(lse).masked_fill(empty, -torch.inf).float()
        log_sum = lse.masked_fill(empty, 0.0).float()
        results = ops.Results(rounded, row_max, log_sum)
        actual = ops.attention_backward(
            ops.Cotangents(cotangent), inputs, extras, results, options, [True] * 3 + [False]
        )
        expected = reference.attention_backward(
            cotangent.double(), None, *wide, mask, rounded.double(), lse, is_causal=size.causal
        )
        names = ("dq", "dk", "dv")
        return dict(zip(names, actual, strict=False)), dict(zip(names, expected, strict=False))

    def _linear(self, name: str, case: Case) -> tuple[Tensors, Tensors]:
        """The backward gets the reference's bits."""
        assert isinstance(case.size, LinearSize)
        rows, n_in, n_out = case.size
        dtype = getattr(torch, case.dtype)
        x, w, b, g = (
            torch.randn(*shape, dtype=dtype, device=self.device) / scale
            for shape, scale in (
                ((rows, n_in), 1.0), ((n_out, n_in), n_in**0.5), ((n_out,), 1.0),
                ((rows, n_out), 1.0),
            )
        )  # fmt: skip
        wide = [t.double() for t in (x, w, b, g)]
        out, passes = reference.linear_relu_forward(*wide[:3])
        actual, expected = {}, {"out": out}
        if "out" in KERNELS[name].tensors:
            actual["out"] = ops.linear_relu_forward(x, w, b)[0]
        if KERNELS[name].backward:
            needs = [name != "linear_grad_weight", *[name != "linear_grad_input"] * 2]
            grads = ops.linear_relu_backward(g, x, w, packed(passes), needs)
            actual |= dict(zip(("dx", "dw", "db"), grads, strict=True))
            grads = reference.linear_relu_backward(wide[3], wide[0], wide[1], passes)
            expected |= dict(zip(("dx", "dw", "db"), grads, strict=True))
        return actual, expected

    def _mlp(self, name: str, case: Case) -> tuple[Tensors, Tensors]:
        assert isinstance(case.size, MlpSize)
        rows, n_in, width, n_out = case.size
        dtype = getattr(torch, case.dtype)
        random = functools.partial(torch.randn, dtype=dtype, device=self.device)
        weights = [random(width, n_in) / n_in**0.5, random(n_out, width) / width**0.5]
        biases, x, g = [random(width), random(n_out)], random(rows, n_in), random(rows, n_out)
        wide = [t.double().requires_grad_() for t in (x, *weights, *biases)]
        out = reference.mlp(wide[0], wide[1:3], wide[3:])
        if not KERNELS[name].backward:
            return {"out": ops.mlp_forward(x, weights, biases)[0]}, {"out": out.detach()}
        hidden = reference.linear_relu(*wide[:2], wide[3]).detach().to(dtype)
        actual = ops.mlp_backward(g, x, weights, [hidden], [True] * 5)
        expected = torch.autograd.grad(out, wide, g.double())
        names = ("dx", "dw1", "dw2", "db1", "db2")
        return dict(zip(names, actual, strict=True)), dict(zip(names, expected, strict=True))


def packed(passes: Tensor) -> Tensor:
    """bool ``[M, N]`` as the ops' bits, uint8 ``[M, ceil(N / 8)]``, the first in the lowest bit."""
    rows, columns = passes.shape
    padded = F.pad(passes.to(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)
    weights = 2 ** torch.arange(8, device=passes.device, dtype=torch.uint8)
    return (padded * weights).sum(-1, dtype=torch.uint8)
