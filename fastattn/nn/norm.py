"""Dropout, the residual sum and the norm after it, as one module."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastattn import functional


class DropoutAddNorm(nn.Module):
    """``norm(residual + dropout(input))`` in one pass; parameters named as ``nn.LayerNorm``'s and
    ``nn.RMSNorm``'s, whose state_dicts it loads.

    Args:
        features: N, the size of the last dimension.
        p: probability of dropping an element of input in training.
        eps: is added to the variance. None: 1e-5; for RMSNorm the dtype's epsilon.
        kind: ``"layer"`` or ``"rms"``.
        prenorm: return the sum as well.
        elementwise_affine: learn a weight.
        bias: learn a bias too; RMSNorm has none.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an unknown ``kind``, or p outside [0, 1].

    >>> import torch, fastattn
    >>> norm = fastattn.nn.DropoutAddNorm(8, p=0.1)
    >>> norm(torch.randn(4, 8), torch.randn(4, 8)).shape
    torch.Size([4, 8])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        p: float = 0.0,
        eps: float | None = None,
        *,
        kind: Literal["layer", "rms"] = "layer",
        prenorm: bool = False,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("layer", "rms"):
            raise ValueError(f"kind: expected 'layer' or 'rms', got {kind!r}")
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p: expected a probability in [0, 1], got {p}")
        self.features, self.p, self.eps = features, p, eps
        self.kind: Literal["layer", "rms"] = kind
        self.prenorm = prenorm
        for name, there in (
            ("weight", elementwise_affine),
            ("bias", elementwise_affine and bias and kind == "layer"),
        ):
            empty = torch.empty(features, device=device, dtype=dtype) if there else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """1 for the weight, 0 for the bias."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm, or with ``prenorm`` the pair (norm, sum).

        Args:
            input: ``[..., features]``.
            residual: of input's shape, or None for 0.
        """
        p = self.p if self.training else 0.0
        if self.prenorm:
            return functional.dropout_add_norm(
                input, residual, self.weight, self.bias, p, self.eps, kind=self.kind, prenorm=True
            )
        return functional.dropout_add_norm(
            input, residual, self.weight, self.bias, p, self.eps, kind=self.kind
        )

    def extra_repr(self) -> str:
        """What ``print`` shows of the module."""
        return f"{self.features}, p={self.p}, eps={self.eps}, kind={self.kind!r}"
