"""Multi-head attention with torch.nn's interface."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as dropout_fn
from torch.nn.functional import linear, pad

from fastattn import functional


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` on the fused kernels: its arguments, its state_dict, its results.

    Scores are never materialised unless ``need_weights`` asks for them. A query whose keys are all masked gets 0 where
    torch gives NaN.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query ``[B, Sq, E]`` with batch_first, else ``[Sq, B, E]``, or unbatched ``[Sq, E]``; key and value likewise.

        key_padding_mask ``[B, Sk]``, attn_mask ``[Sq, Sk]`` or ``[B*H, Sq, Sk]``: bool (True = masked out, as in
        torch.nn) or float, added to the scores. ``is_causal`` promises that attn_mask is causal. Returns the output in
        query's layout and, if asked for, the weights ``[B, Sq, Sk]`` (``[B, H, Sq, Sk]`` when not averaged).
        """
        if any(x.is_nested for x in (query, key, value)):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        _check_inputs(query, key, value, key_padding_mask, attn_mask, self)
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask: expected a mask with the is_causal hint, got None")
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value, batched)
        batch = q.shape[0]
        q = q.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # [B, H, Sq, D]
        k = k.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        v = v.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        if self.add_zero_attn:
            k, v = pad(k, (0, 0, 0, 1)), pad(v, (0, 0, 0, 1))
        added = k.shape[2] - (key.shape[1] if self.batch_first and batched else key.shape[0])
        # A causal attn_mask leaves the appended keys visible, so the hint serves only without them.
        causal = is_causal and added == 0
        mask = self._mask(None if causal else attn_mask, key_padding_mask, batch, added, q.dtype)

        p = self.dropout if self.training else 0.0
        if not need_weights:
            out, weights = functional.scaled_dot_product_attention(q, k, v, mask, p, causal), None
        else:
            weights = self._weights(q, k, mask, causal)
            if p > 0.0:  # torch returns the weights after dropout: output and weights must belong together
                weights = dropout_fn(weights, p)
                out = weights @ v
            else:
                out = functional.scaled_dot_product_attention(q, k, v, mask, 0.0, causal)
        out = linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out[0], weights[0] if weights is not None else None
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, batched: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The projections of query, key, value, ``[B, S, E]``, with bias_k and bias_v appended."""
        same = query is key and key is value

        def batch_first(x: Tensor) -> Tensor:
            if not batched:
                return x[None]
            return x if self.batch_first else x.transpose(0, 1)

        query = batch_first(query)
        key, value = (query, query) if same else (batch_first(key), batch_first(value))
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim and same:
            q, k, v = linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        else:
            if self._qkv_same_embed_dim:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = (
                linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], dim=1)
        return q, k, v

    def _mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        batch: int,
        added: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Both masks as one of scaled_dot_product_attention's, broadcastable to ``[B, H, Sq, Sk]``."""
        masks = []
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
            masks.append(attn_mask)
        if key_padding_mask is not None:
            masks.append(key_padding_mask.view(batch, 1, 1, -1))
        if not masks:
            return None
        if all(m.dtype == torch.bool for m in masks):
            blocked = masks[0] if len(masks) == 1 else masks[0] | masks[1]
            return ~(pad(blocked, (0, added)) if added else blocked)
        total = None
        for m in masks:
            if m.dtype == torch.bool:
                m = torch.zeros(m.shape, dtype=dtype, device=m.device).masked_fill(m, -math.inf)
            total = m.to(dtype) if total is None else total + m.to(dtype)
        return pad(total, (0, added)) if added else total

    @staticmethod
    def _weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """softmax of the scores, ``[B, H, Sq, Sk]``; rows with nothing to attend to are 0."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        if mask is not None:
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -math.inf)
            else:
                scores = scores + mask
        empty = (scores == -math.inf).all(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def _check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    module: MultiheadAttention,
) -> None:
    def bad(argument: str, expected: str, got: object) -> None:
        raise ValueError(f"{argument}: expected {expected}, got {got}")

    if query.dim() not in (2, 3):
        bad("query", "2 (unbatched) or 3 dimensions", tuple(query.shape))
    for name, x, width in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        if x.dim() != query.dim():
            bad(name, f"query's rank {query.dim()}", tuple(x.shape))
        if x.shape[-1] != width:
            bad(name, f"a last extent of {width}", tuple(x.shape))
    if key.shape[:-1] != value.shape[:-1]:
        bad("value", f"key's {tuple(key.shape[:-1])} before the last extent", tuple(value.shape))
    batched = query.dim() == 3
    sequence = 1 if module.batch_first and batched else 0
    batch = query.shape[1 - sequence] if batched else 1
    if batched and key.shape[1 - sequence] != batch:
        bad("key", f"query's batch {batch}", tuple(key.shape))
    seq_q, seq_k = query.shape[sequence], key.shape[sequence]
    if key_padding_mask is not None:
        expected = (batch, seq_k) if batched else (seq_k,)
        if tuple(key_padding_mask.shape) != expected:
            bad("key_padding_mask", f"shape {expected}", tuple(key_padding_mask.shape))
    if attn_mask is not None:
        shapes = [(seq_q, seq_k), (batch * module.num_heads, seq_q, seq_k)]
        if tuple(attn_mask.shape) not in shapes:
            bad("attn_mask", f"shape {shapes[0]} or {shapes[1]}", tuple(attn_mask.shape))
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a bool or floating-point tensor, got {mask.dtype}")
