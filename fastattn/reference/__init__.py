"""The oracle: every equation of DESIGN.md in plain torch, O(S²) memory, any dtype and device.

The functions compute in float32 (float64 for float64) and return the inputs' dtype. ``attention``,
``linear_relu`` and ``mlp`` are differentiable by autograd any number of times. The functions named
after a derivative write its formulas out; the kernels are compared with them. Nothing is checked.

What several of the attention functions take:
    query: ``[*, Hq, Sq, D]``.
    key: ``[*, Hk, Sk, D]``, Hk a divisor of Hq.
    value: ``[*, Hk, Sk, Dv]``.
    attn_mask: None, bool (True = attend) or float, broadcastable to ``[*, Hq, Sq, Sk]``; for a
        function that returns its gradient, of query's rank.
    grad_out: the cotangent of the output, ``[*, Hq, Sq, Dv]``.
    grad_lse: the cotangent of the LSE, ``[*, Hq, Sq]``, or None for 0.
    tangents: of query, key, value and the float mask, in their shapes, None for 0.
    needs: which gradients are wanted: of query, key, value and the float mask.
    options: the keywords is_causal, scale, dropout_p, window_size, softcap and alibi_slopes of
        ``fastattn.scaled_dot_product_attention``; dropout's ``seed``, int64 ``[n]``.

What several of the linear functions take:
    input: ``[*, K]``.
    weight: ``[N, K]``.
    bias: ``[N]`` or None.
    passes: R of E15, bool ``[*, N]``: the outputs through which a gradient passes.

The formulas of the backward are those of FlashAttention-2 (Dao 2023, arXiv 2307.08691); those of
the second order follow from E12 by E13.

>>> import torch
>>> from fastattn import reference
>>> query, key, value = torch.randn(3, 2, 4, 16, 8, dtype=torch.float64).requires_grad_()
>>> out, lse = reference.attention(query, key, value, is_causal=True)
>>> t = torch.randn_like(out)
>>> found = reference.attention_backward(t, None, query, key, value, None, out, lse, is_causal=True)
>>> expected = torch.autograd.grad(out, (query, key, value), t, create_graph=True)
>>> all(torch.allclose(x, y) for x, y in zip(found, expected))
True
>>> tangents = (t, None, None, None)  # moves query alone
>>> t_out, t_lse = reference.attention_jvp(query, key, value, None, tangents, is_causal=True)
>>> found = reference.attention_double_backward(
...     t, None, query, key, value, None, tangents, is_causal=True
... )
>>> expected = torch.autograd.grad(expected[0], (query, key, value), t)
>>> all(torch.allclose(x, y) for x, y in zip(found, expected))
True
"""

from fastattn.reference.attention import (
    Setting,
    attention,
    attention_backward,
    attention_double_backward,
    attention_forward,
    attention_in,
    attention_jvp,
    attention_weights,
)
from fastattn.reference.layers import (
    activation,
    activation_dropout,
    gated_linear,
    linear,
    linear_relu,
    linear_relu_backward,
    linear_relu_forward,
    linear_relu_jvp,
    mlp,
)
from fastattn.reference.norm import (
    dropout_add_norm,
    dropout_add_norm_backward,
    dropout_add_norm_jvp,
    keep_factor,
)
from fastattn.reference.philox import philox, philox_keep_mask

__all__ = [
    "Setting",
    "activation",
    "activation_dropout",
    "attention",
    "attention_backward",
    "attention_double_backward",
    "attention_forward",
    "attention_in",
    "attention_jvp",
    "attention_weights",
    "dropout_add_norm",
    "dropout_add_norm_backward",
    "dropout_add_norm_jvp",
    "gated_linear",
    "keep_factor",
    "linear",
    "linear_relu",
    "linear_relu_backward",
    "linear_relu_forward",
    "linear_relu_jvp",
    "mlp",
    "philox",
    "philox_keep_mask",
]
