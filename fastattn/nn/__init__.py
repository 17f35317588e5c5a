"""Drop-in modules: torch.nn's signatures, parameter names and meanings on fastattn's kernels."""

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.linear import MLP, Linear, LinearReLU
from fastattn.nn.transformer import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "MLP",
    "Linear",
    "LinearReLU",
    "MultiheadAttention",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
