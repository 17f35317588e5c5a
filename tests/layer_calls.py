"""What the tests of linear layers call, and torch's layers beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastattn
from fastattn import ops
from fastattn.testing import assert_accurate

ACTIVATIONS = ops.ACTIVATIONS
SLOPED = tuple(a for a in ACTIVATIONS if a not in (None, "relu"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TORCHS = {
    None: lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda z: F.relu(z) ** 2,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def linear(x, w, b, activation, p=0.0):
    """The call under test, always by the kernels, with the same dropout each time."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return fastattn.linear(x, w, b, activation, p, backend="cpu")


def seed_of_linear():
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)


def check(name, actual, oracle, peer):
    """The error policy; in float64, of which the oracle is made too, some roundings of each."""
    if actual.dtype == torch.float64:
        return torch.testing.assert_close(actual, oracle, rtol=1e-13, atol=1e-13)
    return assert_accurate(name, actual.detach(), oracle.detach(), peer.detach())
