"""A call of the attention ops, for tests: the ops in their order from the user's words."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn import ops


class AttentionCall:
    """``numbers``: fields of ``ops.Options``; scale is 1 by default."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        alibi_slopes: Tensor | None = None,
        seed: Tensor | None = None,
        starts: tuple[Tensor | None, Tensor | None] = (None, None),
        window_size: tuple[int, int] = (-1, -1),
        backend: str = ops.NATIVE,
        **numbers: object,
    ) -> None:
        self.inputs = ops.Inputs(query, key, value, attn_mask)
        self.extras = ops.Extras(alibi_slopes, seed, *starts)
        left, right = window_size
        self.options = ops.Options(left=left, right=right)._replace(**numbers)
        self.backend = backend
        self.results: ops.Results | None = None

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(out, lse, row_max, log_sum); the derivatives take them."""
        found = ops.attention_forward(self.inputs, self.extras, self.options, self.backend)
        self.results = ops.Results(found[0], *found[2:])
        return found

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None = None, needs: Sequence[bool] | None = None
    ) -> tuple[Tensor, ...]:
        """All gradients that there are, where ``needs`` is not given."""
        return ops.attention_backward(
            ops.Cotangents(grad_out, grad_lse), self.inputs, self.extras, self.results,
            self.options, needs or [True] * 3 + [self.has_float_mask], self.backend,
        )  # fmt: skip

    def jvp(self, tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        return ops.attention_jvp(
            self.inputs, self.extras, ops.Tangents(*tangents), self.results, self.options,
            self.backend,
        )  # fmt: skip

    def double_backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        tangents: Sequence[Tensor | None],
        needs: Sequence[bool] | None = None,
    ) -> tuple[Tensor, ...]:
        return ops.attention_double_backward(
            ops.Cotangents(grad_out, grad_lse), self.inputs, self.extras, ops.Tangents(*tangents),
            self.results, self.options, needs or [True] * 4 + [self.has_float_mask], self.backend,
        )  # fmt: skip

    @property
    def has_float_mask(self) -> bool:
        mask = self.inputs.attn_mask
        return mask is not None and mask.is_floating_point()
