"""Transformer encoder with torch.nn's interface."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastattn import backends
from fastattn.functional._served import ordinary, unobserved
from fastattn.nn._packed import Packing, packing_of, why_not_packed
from fastattn.nn._plain import (
    UNPAD,
    as_written,
    has_hooks,
    no_global_hooks,
    run_torchs,
    scripted_as,
    was_swapped,
)
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.dropout import Dropout
from fastattn.nn.linear import Linear
from fastattn.nn.transformer import TransformerEncoderLayer


class TransformerEncoder(nn.TransformerEncoder):
    """A stack of encoder layers: ``torch.nn.TransformerEncoder``'s arguments and state_dict.

    No nested tensor is made, and outputs at padded positions are ordinary values. (In a model that
    ``fastattn.patch`` swapped they are torch's: where torch makes a nested tensor at inference, its
    own forward runs.) With ``unpad`` they are 0, and no time is spent on them, in training and at
    inference: the layers run on the tokens alone, packed one sequence behind the other. The mask
    must then be None or causal and src_key_padding_mask bool, the layers fastattn's, without hooks;
    any other call runs padded, and a FastAttnWarning says why.

    Args:
        encoder_layer: the layer to copy: fastattn's, or torch's own, which runs torch's code until
            ``fastattn.patch`` swaps it.
        num_layers: how many copies.
        norm: a module for the end, or None.
        enable_nested_tensor: without effect.
        mask_check: without effect.
        unpad: skip the places that src_key_padding_mask hides.

    >>> import torch, fastattn
    >>> layer = fastattn.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    >>> fastattn.nn.TransformerEncoder(layer, 2)(torch.randn(2, 16, 64)).shape
    torch.Size([2, 16, 64])
    """

    __prepare_scriptable__ = scripted_as(nn.TransformerEncoder)
    _fastattn_unpad = False

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
        *,
        unpad: bool = False,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor
        if unpad:
            vars(self)[UNPAD] = True

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The layers, one after the other, then the norm.

        Args:
            src: as in the layers.
            mask: src_mask of the layers. A layer of another class than fastattn's gets the masks
                that torch gives it: float, 0 and -inf.
            src_key_padding_mask: as in the layers.
            is_causal: a promise that mask is the causal mask; None looks whether it is.

        Returns:
            A tensor of src's shape.
        """
        nested = self._may_be_nested(src_key_padding_mask)
        if (
            not len(self.layers)
            or not as_written(nn.TransformerEncoder)
            or not unobserved()
            or not ordinary(src, mask, src_key_padding_mask, exported=not was_swapped(self))
            or not all(m is None or _is_mask(m) for m in (mask, src_key_padding_mask))
            or (nested and not self._fastattn_unpad)
        ):
            return run_torchs(self, super().forward, src, mask, src_key_padding_mask, is_causal)
        if is_causal is None:
            is_causal = _is_causal(mask)
        if self._fastattn_unpad and src_key_padding_mask is not None:
            packing = self._packing(src, mask, src_key_padding_mask, is_causal)
            if packing is not None:
                return self._of_packed(src, packing, is_causal)
            if nested:  # torch's result is 0 at padding too
                return run_torchs(self, super().forward, src, mask, src_key_padding_mask, is_causal)
        given = {"src_mask": mask, "src_key_padding_mask": src_key_padding_mask}
        added = {name: _added(m, src.dtype) for name, m in given.items()}
        x = src
        for layer in self.layers:
            own = type(layer) is TransformerEncoderLayer and not has_hooks(layer)
            x = layer(x, is_causal=is_causal, **(given if own and no_global_hooks() else added))
        return x if self.norm is None else self.norm(x)

    def _packing(
        self, src: Tensor, mask: Tensor | None, padding: Tensor, is_causal: bool
    ) -> Packing | None:
        """The packing to run on; None where the padded batch runs."""
        if torch.compiler.is_compiling() or src.dim() != 3 or not src.numel():
            return None
        reason = self._why_not_packed(src, mask, padding, is_causal)
        if reason is not None:
            backends.warn_once(f"unpad: a TransformerEncoder runs padded: {reason}", 4)
            return None
        return packing_of(~padding)

    def _why_not_packed(
        self, src: Tensor, mask: Tensor | None, padding: Tensor, is_causal: bool
    ) -> str | None:
        if mask is not None and not is_causal:
            return "mask is not the causal one"
        if mask is None and is_causal:
            return "is_causal is set and mask is None"
        if padding.dtype != torch.bool:
            return "src_key_padding_mask is not bool"
        layers = list(self.layers)
        if not all(type(layer) is TransformerEncoderLayer for layer in layers):
            return "its layers are not fastattn's"
        if len({layer.self_attn.batch_first for layer in layers}) > 1:
            return "its layers differ in batch_first"
        sizes = src.shape[:2] if layers[0].self_attn.batch_first else src.shape[1::-1]
        if padding.shape != sizes:
            return "src_key_padding_mask does not have the sizes of src"
        reason = why_not_packed(self, _PACKED.__contains__)
        if reason is None and not no_global_hooks():
            reason = "a hook is registered for all modules"
        if reason is None and not all(layer._takes_packed(src[0]) for layer in layers):
            reason = "a layer has options that packed sequences do not have"
        return reason

    def _of_packed(self, src: Tensor, packing: Packing, is_causal: bool) -> Tensor:
        batch_first = self.layers[0].self_attn.batch_first
        x = packing.pack(src if batch_first else src.transpose(0, 1))
        for layer in self.layers:
            x = layer._of_packed(x, packing, is_causal)
        out = packing.unpack(x if self.norm is None else self.norm(x))
        return out if batch_first else out.transpose(0, 1)

    def _may_be_nested(self, padding: Tensor | None) -> bool:
        """Whether torch's forward may make a nested tensor, after which padded positions are 0."""
        wanted = getattr(self, "use_nested_tensor", False)
        if not wanted or padding is None or not len(self.layers):
            return False
        return not self.layers[0].training


# Classes inside an encoder of ours that compute each token by itself, or know packed sequences.
_PACKED = frozenset(
    {
        TransformerEncoderLayer,
        MultiheadAttention,
        Dropout,
        Linear,
        type(nn.MultiheadAttention(1, 1).out_proj),
    }
)


def _is_mask(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or mask.is_floating_point()


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as it is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _is_causal(mask: Tensor | None) -> bool:
    """Whether the mask, True or -inf where masked out, is exactly the causal one."""
    if mask is None or mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    if torch.compiler.is_compiling() or mask.device.type == "meta":
        return False  # reading values would break the graph; the mask itself gives the same result
    if mask.dtype != torch.bool and mask.requires_grad:
        return False  # a learned bias: only the mask itself gets the gradient
    above = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, above)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(above, -math.inf))
