"""Drop-in modules: torch.nn's arguments, parameter names and meanings, on fastattn's kernels.

A state_dict of the torch module loads into the fastattn module, and the other way round. A module
runs torch's own code wherever a kernel may not stand in for it: hooks, subclasses of Tensor,
symbolic traces.
"""

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.dropout import Dropout
from fastattn.nn.encoder import TransformerEncoder
from fastattn.nn.linear import Linear, LinearActivation, LinearReLU
from fastattn.nn.mlp import MLP, GatedMLP
from fastattn.nn.norm import DropoutAddNorm
from fastattn.nn.transformer import TransformerEncoderLayer

__all__ = [
    "MLP",
    "Dropout",
    "DropoutAddNorm",
    "GatedMLP",
    "Linear",
    "LinearActivation",
    "LinearReLU",
    "MultiheadAttention",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
