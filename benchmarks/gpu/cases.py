"""What is timed on a GPU, and which kernels a timing stands on. Free of torch."""

from __future__ import annotations

from typing import NamedTuple


class Attention(NamedTuple):
    batch: int
    heads: int
    seq: int
    dim: int
    mask: str = "full"  # full, causal, padding, bool, bias
    dtype: str = "bfloat16"
    backward: bool = False

    @property
    def name(self) -> str:
        size = f"{self.batch}x{self.heads}x{self.seq}x{self.dim}"
        return f"attention {size} {self.dtype} {self.mask}"

    @property
    def flops(self) -> float:
        """4·B·H·S²·D, half of it where causal; the backward 2.5 times that."""
        full = 4.0 * self.batch * self.heads * self.seq**2 * self.dim
        return full * (0.5 if self.mask == "causal" else 1.0) * (2.5 if self.backward else 1.0)

    @property
    def stands_on(self) -> tuple[str, ...]:
        """The kernels of gpu.smoke that the CUDA library takes."""
        if self.mask == "padding":
            return ("attention_forward_masked", *["attention_backward_masked"] * self.backward)
        return (
            f"attention_forward{self.dim}",
            *[f"attention_backward{self.dim}"] * self.backward,
        )


class SecondOrder(NamedTuple):
    """The kernels of forward mode and of the second derivative.

    FLOPs: the tangent 10·B·H·S²·D (five products), the second derivative 24 (twelve).
    """

    batch: int
    heads: int
    seq: int
    dim: int
    mask: str = "full"  # full, causal
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        size = f"{self.batch}x{self.heads}x{self.seq}x{self.dim}"
        return f"second order {size} {self.dtype} {self.mask}"

    @property
    def flops(self) -> float:
        return Attention(*self).flops

    stands_on = ()


class Linear(NamedTuple):
    rows: int
    n_in: int
    n_out: int

    @property
    def name(self) -> str:
        return f"linear+ReLU {self.rows}x{self.n_in}->{self.n_out} bfloat16"

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.n_in * self.n_out

    stands_on = (
        "linear_forward128", "linear_forward256", "linear_split",
        "linear_grad_input", "linear_grad_weight",
    )  # fmt: skip


class Step(NamedTuple):
    """A training step of 784-128-10: forward, loss, backward, SGD."""

    rows: int

    @property
    def name(self) -> str:
        return f"MLP step 784-128-10, {self.rows} rows bfloat16"

    @property
    def flops(self) -> float:
        return 3 * 2.0 * self.rows * (784 * 128 + 128 * 10)

    stands_on = ("mlp_forward", "mlp_backward", "linear_grad_weight", "linear_split")


Case = Attention | SecondOrder | Linear | Step

_CAUSAL128 = [Attention(16384 // s, 16, s, 128, "causal") for s in (8192, 2048, 4096, 16384)]
_MASKED = [
    Attention(16, 12, 512, 64, "padding"),
    Attention(4, 16, 2048, 64, "bool"),
    Attention(4, 16, 2048, 64, "bias"),
    Attention(4, 16, 2048, 128, "bias"),
]
# The most telling case of each family comes first: what does not fit is left out from the end.
FAMILIES: dict[str, list[Case]] = {
    "attention forward": [
        _CAUSAL128[0],
        Attention(2, 16, 8192, 128),
        Attention(2, 32, 8192, 64),
        *_CAUSAL128[1:],
        Attention(2, 8, 8192, 256),
        Attention(2, 32, 8192, 64, "causal"),
        Attention(16, 12, 512, 64, "padding"),
    ],
    "attention backward": [
        case._replace(backward=True)
        for case in (
            *_CAUSAL128[:2],
            Attention(2, 32, 8192, 64),
            *_CAUSAL128[3:],
            Attention(16, 12, 512, 64, "padding"),
        )
    ],
    "linear": [Linear(8192, 4096, 4096), Linear(8192, 768, 3072), Linear(1024, 784, 128)],
    "step": [Step(64), Step(1024)],
    "masks": [case._replace(backward=b) for case in _MASKED[1:] for b in (False, True)],
    "float32": [
        Attention(2, 16, 2048, 64, mask, "float32", b)
        for mask in ("full", "causal")
        for b in (False, True)
    ],
    "second order": [
        SecondOrder(2, 32, 8192, 64),
        SecondOrder(2, 16, 8192, 128),
        SecondOrder(2, 16, 8192, 128, "causal"),
    ],
}
# ncu looks at these: name -> the kernel's name on the GPU, the case, what is run of it.
PROFILES: dict[str, tuple[str, Case, str]] = {
    "attention_forward128": ("attention_forward_kernel", _CAUSAL128[0], "forward"),
    "attention_backward128": (
        "attention_backward_kernel",
        _CAUSAL128[0]._replace(backward=True),
        "backward",
    ),
    "attention_forward64": ("attention_forward_kernel", Attention(2, 32, 8192, 64), "forward"),
    "linear_forward256": ("linear_kernel", Linear(8192, 4096, 4096), "forward"),
    "linear_grad_weight": ("linear_kernel", Linear(8192, 4096, 4096), "dW"),
}
