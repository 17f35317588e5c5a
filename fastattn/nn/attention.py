"""Multi-head attention with torch.nn's interface."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import functional
from fastattn.functional import drop_in
from fastattn.functional._autograd import autocast_dtype
from fastattn.functional._served import (
    ordinary,
    serves_attention,
    serves_layers,
    unobserved,
)
from fastattn.functional.drop_in import attention_by_size
from fastattn.nn._packed import Packing
from fastattn.nn._plain import (
    as_written,
    keeps_torchs_draws,
    run_torchs,
    scripted_as,
    was_swapped,
)


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` on the fused kernels: its arguments, state_dict and results.

    Scores are stored only where ``need_weights`` asks for the weights. Two differences:

    - A query whose keys are all masked gets 0, where torch gives 0 or NaN depending on the path it
      takes.
    - An ``is_causal`` hint never hides the keys that ``add_bias_kv`` and ``add_zero_attn`` append.
      (In a module that ``fastattn.patch`` swapped the hint does what it does in torch.)

    Unusual tensors and modes run torch's own forward.

    Args:
        embed_dim: E, size of an input and output row.
        num_heads: H, a divisor of E.
        dropout: probability of dropping an attention weight in training.
        bias: learn biases of the projections.
        add_bias_kv: append a learned key and value.
        add_zero_attn: append a key and value of 0.
        kdim: size of a key row; E by default.
        vdim: size of a value row; E by default.
        batch_first: tensors are ``[B, S, E]`` instead of ``[S, B, E]``.
        device: of the parameters.
        dtype: of the parameters.

    >>> import torch, fastattn
    >>> layer, x = fastattn.nn.MultiheadAttention(64, 4, batch_first=True), torch.randn(2, 16, 64)
    >>> out, weights = layer(x, x, x, need_weights=False)
    >>> out.shape, weights
    (torch.Size([2, 16, 64]), None)
    """

    __prepare_scriptable__ = scripted_as(nn.MultiheadAttention)

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
        """Attention of ``num_heads`` heads.

        Args:
            query: ``[B, Sq, E]`` with batch_first, else ``[Sq, B, E]``; or unbatched ``[Sq, E]``.
            key: the same with Sk and kdim.
            value: the same with Sk and vdim.
            key_padding_mask: ``[B, Sk]`` (unbatched ``[Sk]``), bool (True = masked out, as
                everywhere in torch.nn) or float, added to the scores.
            need_weights: also return the attention weights, after dropout in training.
            attn_mask: ``[Sq, Sk]`` or ``[B*H, Sq, Sk]``, bool or float as above.
            average_attn_weights: average the returned weights over the heads.
            is_causal: a promise that attn_mask is the causal mask.

        Returns:
            The output in query's layout, and None or the weights: ``[B, Sq, Sk]`` (not averaged
            ``[B, H, Sq, Sk]``), without B when unbatched.

        Raises:
            ValueError: sizes that do not match, is_causal without attn_mask.
            TypeError: a dtype that is not the parameters', or not a mask's.
        """
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        p = self.dropout if self.training else 0.0
        torchs = p > 0.0 and keeps_torchs_draws(self)
        if torchs or not self._usual(query, key, value, key_padding_mask, attn_mask):
            return run_torchs(self, super().forward, query, key, value, *options)
        try:
            _check(self, query, key, value, key_padding_mask, attn_mask, is_causal)
        except (TypeError, ValueError):
            if was_swapped(self):
                return run_torchs(self, super().forward, query, key, value, *options)
            raise
        batched = query.dim() == 3
        batch_first = self.batch_first or not batched
        q, k, v = self._project(query, key, value, batched, batch_first)
        added = (self.bias_k is not None) + self.add_zero_attn
        if added and is_causal and was_swapped(self):
            return run_torchs(self, super().forward, query, key, value, *options)
        causal = is_causal and added == 0
        mask = self._merge(None if causal else attn_mask, key_padding_mask, added, q)

        weights = None
        if p > 0.0 and need_weights:
            # The weights that are returned must be those that made the output.
            weights = F.dropout(_softmax_scores(q, k, mask, causal), p)
            out = weights @ v
        else:
            if need_weights:
                weights = _softmax_scores(q, k, mask, causal)
            out = attention_by_size(q, k, v, mask, p, causal)
        # Outside of inference torch's result is stored sequence first, and a dropout after it draws
        # in that order.
        learned = torch.is_grad_enabled() and self.out_proj.weight.requires_grad
        inference = not (self.training or out.requires_grad or learned)
        lies_batch_first = batch_first and (inference or not batched)
        out = out.transpose(1, 2) if lies_batch_first else out.permute(2, 0, 1, 3)
        out = _product(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if batch_first and not lies_batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            weights = None
        elif average_attn_weights and weights is not None:
            weights = weights.mean(dim=1)
        if not batched:
            out, weights = out[0], None if weights is None else weights[0]
        return out, weights

    def _takes_packed(self, x: Tensor) -> bool:
        """Whether ``_of_packed`` gives the module's result."""
        plain = type(self) is MultiheadAttention and self._usual(x, x, x, None, None)
        return plain and self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn

    def _of_packed(self, x: Tensor, packing: Packing, is_causal: bool) -> Tensor:
        """Self-attention of each sequence of packed tokens ``[T, E]``."""
        heads = _product(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = heads.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)
        starts, longest = packing.starts, packing.longest
        p = self.dropout if self.training else 0.0
        out = functional.varlen_attn(
            q, k, v, starts, starts, longest, longest, is_causal, dropout_p=p
        )
        return _product(out.flatten(1), self.out_proj.weight, self.out_proj.bias)

    def _usual(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> bool:
        """Whether the call may leave torch's code: nobody watches it, and tensors are ordinary."""
        exported = not was_swapped(self)  # a layer built as fastattn's is exported as its ops
        return (
            as_written(nn.MultiheadAttention)
            and unobserved()
            and ordinary(query, key, value, key_padding_mask, attn_mask, exported=exported)
            and ordinary(
                self.in_proj_weight, self.in_proj_bias, self.bias_k, self.bias_v, exported=exported
            )
            and ordinary(
                self.q_proj_weight, self.k_proj_weight, self.v_proj_weight, exported=exported
            )
            and ordinary(self.out_proj.weight, self.out_proj.bias, exported=exported)
            and not any(x is None for x in (query, key, value))
            and serves_attention(query, self.head_dim)
        )

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, batched: bool, batch_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B, H, Sq, D]``, k and v ``[B, H, Sk, D]`` with the appended keys; views, no copies,
        where none is appended."""
        bias = self.in_proj_bias
        if batched and batch_first and torch.is_grad_enabled():
            # The caller may change the inputs in place before the backward: torch's product takes a
            # copy here too.
            own_query = query.clone()
            own_key = own_query if key is query else key.clone()
            value = own_query if value is query else own_key if value is key else value.clone()
            query, key = own_query, own_key
        if self._qkv_same_embed_dim and query is key and key is value:
            projected = _product(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        else:
            if self._qkv_same_embed_dim:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            projected = tuple(map(_product, (query, key, value), weights, biases))

        def heads(x: Tensor) -> Tensor:
            x = x.unflatten(-1, (self.num_heads, self.head_dim))
            if not batched:
                x = x[None]
            return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

        q, k, v = map(heads, projected)
        if self.bias_k is not None and self.bias_v is not None:
            one_key = (1, self.num_heads, 1, self.head_dim)
            k, v = (
                torch.cat([x, b.to(x.dtype).view(one_key).expand(x.shape[0], -1, -1, -1)], dim=2)
                for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return q, k, v

    def _merge(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, added: int, q: Tensor
    ) -> Tensor | None:
        """Both masks as one of scaled_dot_product_attention's. It broadcasts to ``[B, H, Sq, Sk]``
        and is of full size only where one of the two is."""
        masks = []
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (q.shape[0], self.num_heads))
            masks.append(attn_mask)
        if key_padding_mask is not None:
            masks.append(key_padding_mask[..., None, None, :])
        if not masks:
            return None
        if all(m.dtype == torch.bool for m in masks):
            return ~F.pad(masks[0] if len(masks) == 1 else masks[0] | masks[1], (0, added))
        masks = [
            torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -math.inf)
            if m.dtype == torch.bool
            else m.to(q.dtype)
            for m in masks
        ]
        return F.pad(masks[0] if len(masks) == 1 else masks[0] + masks[1], (0, added))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, by the kernels where they are faster."""
    if torch.compiler.is_compiling() or not serves_layers(x, [weight], [bias]):
        return F.linear(x, weight, bias)
    return drop_in.linear(x, weight, bias)


def _softmax_scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The attention weights ``[B, H, Sq, Sk]``; rows with nothing to attend to are 0."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -math.inf
        )
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def _check(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> None:
    def bad(
        argument: str, expected: str, got: object, kind: type[Exception] = ValueError
    ) -> NoReturn:
        raise kind(f"{argument}: expected {expected}, got {got}")

    if query.dim() not in (2, 3):
        bad("query", "2 (unbatched) or 3 dimensions", tuple(query.shape))
    dtype = module.out_proj.weight.dtype
    for name, x, width in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        if x.dtype != dtype and autocast_dtype(x.device.type) is None:
            bad(name, f"the parameters' dtype {dtype}", x.dtype, TypeError)
        if x.dim() != query.dim():
            bad(name, f"query's rank {query.dim()}", tuple(x.shape))
        if x.shape[-1] != width:
            bad(name, f"a last dimension of {width}", tuple(x.shape))
    if key.shape[:-1] != value.shape[:-1]:
        bad("value", f"key's {tuple(key.shape[:-1])} before the last dimension", tuple(value.shape))
    batched = query.dim() == 3
    seq_dim = 1 if module.batch_first and batched else 0
    batch = query.shape[1 - seq_dim] if batched else 1
    if batched and key.shape[1 - seq_dim] != batch:
        bad("key", f"query's batch size {batch}", tuple(key.shape))
    seq_q, seq_k = query.shape[seq_dim], key.shape[seq_dim]
    if is_causal and attn_mask is None:
        bad("attn_mask", "the causal mask that is_causal=True promises", None)
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            bad(name, "a bool (True = masked out) or floating-point tensor", mask.dtype, TypeError)
    if key_padding_mask is not None:
        expected = (batch, seq_k) if batched else (seq_k,)
        if tuple(key_padding_mask.shape) != expected:
            bad("key_padding_mask", f"shape {expected}", tuple(key_padding_mask.shape))
    if attn_mask is not None:
        flat, full = (seq_q, seq_k), (batch * module.num_heads, seq_q, seq_k)
        if attn_mask.shape != flat and attn_mask.shape != full:  # sizes may be symbols
            bad("attn_mask", f"shape {flat} or {full}", tuple(attn_mask.shape))
