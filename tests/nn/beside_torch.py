"""torch.nn.MultiheadAttention beside ours, with the same parameters, masks and inputs, in fp64."""

from __future__ import annotations

import torch
from torch import nn

from fastattn.nn import MultiheadAttention

B, H, SQ, SK, E = 2, 3, 5, 7, 12
CONSTRUCTIONS = {
    "plain": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv_zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "kdim_vdim": {"kdim": 8, "vdim": 10},
    "kdim_bias_kv": {"kdim": 8, "add_bias_kv": True},
}
MASKS = ("none", "padding", "padding_float", "bool", "float", "bool_3d", "float_3d")


def close(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Equal up to the rounding of fp64 sums; a NaN is a failure."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def pair(**options) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours with the same, nowhere zero, parameters."""
    options = {"embed_dim": E, "num_heads": H, "dtype": torch.float64, **options}
    theirs, ours = nn.MultiheadAttention(**options), MultiheadAttention(**options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.uniform_(-0.5, 0.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def masks(kind: str, batch: int | None = B, seq_q: int = SQ, seq_k: int = SK) -> dict[str, object]:
    """Masks in torch.nn's meaning; every query keeps its first key."""
    padding = torch.rand(batch or 1, seq_k) < 0.4
    padding[:, 0] = False
    if batch is None:
        padding = padding[0]
    lead = ((batch or 1) * H,) if kind.endswith("3d") else ()
    blocked = torch.rand(*lead, seq_q, seq_k) < 0.4
    blocked[..., 0] = False
    added = torch.randn(*blocked.shape, dtype=torch.float64).masked_fill(blocked, -torch.inf)
    found: dict[str, object] = {}
    if "padding" in kind:
        is_float = "padding_float" in kind
        found["key_padding_mask"] = torch.randn(padding.shape).double() if is_float else padding
    if "bool" in kind:
        found["attn_mask"] = blocked
    elif kind.startswith("float") or "+float" in kind:
        found["attn_mask"] = added
    return found


def inputs(module: nn.MultiheadAttention, batch: int | None = B) -> list[torch.Tensor]:
    def shape(seq: int, width: int) -> tuple[int, ...]:
        if batch is None:
            return (seq, width)
        return (batch, seq, width) if module.batch_first else (seq, batch, width)

    sizes = ((SQ, E), (SK, module.kdim), (SK, module.vdim))
    return [torch.randn(*shape(*s), dtype=torch.float64, requires_grad=True) for s in sizes]


def compare(
    theirs: nn.MultiheadAttention,
    ours: MultiheadAttention,
    tensors: list[torch.Tensor],
    **call,
) -> None:
    """Outputs, weights, and the gradients of inputs and parameters."""
    for module in (theirs, ours):
        module.zero_grad()
    copies = {id(x): x.detach().clone().requires_grad_() for x in tensors}
    others = [copies[id(x)] for x in tensors]
    expected, expected_weights = theirs(*tensors, **call)
    out, weights = ours(*others, **call)
    close(out, expected)
    close(weights, expected_weights)
    grad = torch.randn_like(expected)
    for x, w, inp in ((expected, expected_weights, tensors), (out, weights, others)):
        for t in inp:
            t.grad = None
        loss = (x * grad).sum() + (0.0 if w is None else (w**2).sum())
        loss.backward()
    for a, b in zip(others, tensors, strict=True):
        close(a.grad, b.grad)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.grad, b.grad)
