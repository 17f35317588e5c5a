"""A padded batch as its tokens alone, one sequence behind the other."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.functional._torch_internals import has_hooks

# Modules of torch.nn that compute each token from that token alone.
TOKENWISE: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Dropout,
        nn.GELU,
        nn.Identity,
        nn.LayerNorm,
        nn.Linear,
        nn.ModuleDict,
        nn.ModuleList,
        nn.RMSNorm,
        nn.ReLU,
        nn.Sequential,
        nn.SiLU,
        nn.Tanh,
    }
)


class Packing(NamedTuple):
    """Where the tokens of a padded batch are.

    places: int64 ``[T]``, the tokens among the batch's B * S places.
    starts: int32 ``[B + 1]``, where each sequence starts among the tokens, and T.
    longest: tokens of the longest sequence.
    shape: B, S.
    """

    places: Tensor
    starts: Tensor
    longest: int
    shape: tuple[int, int]

    def pack(self, x: Tensor) -> Tensor:
        """``[B, S, ...]`` -> ``[T, ...]``."""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x: Tensor) -> Tensor:
        """``[T, ...]`` -> ``[B, S, ...]``, 0 where no token is."""
        padded = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return padded.index_copy(0, self.places, x).unflatten(0, self.shape)


def packing_of(tokens: Tensor) -> Packing | None:
    """The packing of a bool ``[B, S]``, True where a token is. None where packing saves nothing,
    and where a sequence has no token: what a model then makes of it depends on its padding."""
    places = tokens.flatten().nonzero().squeeze(1)
    if len(places) == tokens.numel():
        return None
    lengths = tokens.sum(1, dtype=torch.int32)
    shortest, longest = (int(x) for x in torch.stack(lengths.aminmax()).tolist())
    if shortest == 0:
        return None
    starts = lengths.new_zeros(len(lengths) + 1)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=starts[1:])
    return Packing(places, starts, longest, (tokens.shape[0], tokens.shape[1]))


def why_not_packed(
    module: nn.Module,
    known: Callable[[type[nn.Module]], bool],
    harmless: Callable[[Any], bool] = lambda hook: False,
    among: Collection[type[nn.Module]] = TOKENWISE,
) -> str | None:
    """Why ``module`` cannot run on packed tokens, or None: something inside may compute a token
    from its neighbours, or a hook would see the packed tensors.

    Args:
        module: the module, itself not looked at.
        known: whether a class is known to be right, beside those of ``among``.
        harmless: whether a forward hook does nothing now.
    """
    left = list(module._modules.values())
    while left:
        inner = left.pop()
        if inner is None:
            continue
        kind = type(inner)
        if kind not in among and not known(kind):
            return f"{kind.__name__} is not known to compute each token by itself"
        if has_hooks(inner) and not _only_harmless(inner, harmless):
            return f"a {kind.__name__} has hooks, or a forward of its own"
        left += inner._modules.values()
    return None


def _only_harmless(module: nn.Module, harmless: Callable[[Any], bool]) -> bool:
    others = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return (
        not any(others)
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and all(map(harmless, module._forward_hooks.values()))
    )
