"""The losses that a step of training knows, and the calls of them that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.functional._served import ordinary
from fastattn.nn._plain import CROSS_ENTROPY, MSE_LOSS, is_plain
from fastattn.ops import LossOptions
from fastattn.training._unknown import NotServed

_CROSS_ENTROPY, _MSE = LossOptions("cross_entropy"), LossOptions("mse")


def read_loss(loss: Callable[..., Tensor]) -> LossOptions:
    """What a loss computes at its next call; raises NotServed for one that is not known."""
    if isinstance(loss, nn.Module):
        if is_plain(loss, nn.CrossEntropyLoss):
            return _of_module("cross_entropy", loss)
        if is_plain(loss, nn.MSELoss):
            return _of_module("mse", loss)
    elif loss is CROSS_ENTROPY:
        return _CROSS_ENTROPY
    elif loss is MSE_LOSS:
        return _MSE
    name = type(loss).__name__ if isinstance(loss, nn.Module) else repr(loss)
    raise NotServed(f"the loss is {name}, not the cross entropy or the squared error, or has hooks")


def _of_module(name: str, loss: nn.Module) -> LossOptions:
    own = loss.__dict__
    reduction = own.get("reduction")
    if reduction not in ("mean", "sum"):
        raise NotServed(f"the loss's reduction is {reduction!r}")
    if name == "mse":
        return LossOptions(name, reduction == "mean")
    options = LossOptions(
        name, reduction == "mean", own["_buffers"].get("weight"), own.get("ignore_index", 0.5),
        own.get("label_smoothing", "absent"),
    )  # fmt: skip
    smoothing = options.label_smoothing
    if type(smoothing) not in (float, int) or not 0.0 <= smoothing <= 1.0:
        raise NotServed(f"the loss's label_smoothing is {smoothing!r}")
    if type(options.ignore_index) is not int or "weight" in own:
        raise NotServed("the loss's ignore_index is no number, or its weight no buffer")
    return options


def check_targets(options: LossOptions, targets: Any, rows: int, n_out: int, like: Tensor) -> None:
    """Raises NotServed where the loss's kernel does not take the targets of ``rows`` rows."""
    if not isinstance(targets, Tensor) or not ordinary(targets) or not targets.is_cpu:
        raise NotServed("the labels are no ordinary tensor on the CPU")
    if targets.requires_grad or targets.is_inference():
        raise NotServed("the labels require a gradient, or are of inference mode")
    if options.name == "mse":
        if targets.dtype != like.dtype or targets.shape != (rows, n_out):
            raise NotServed("the targets are not of the output's dtype and shape")
        return
    if targets.dtype != torch.int64 or targets.shape != (rows,):
        raise NotServed("the labels are no class indices, int64, one a row")
    weights = options.class_weights
    if weights is not None and not (
        ordinary(weights)
        and weights.is_cpu
        and weights.dtype == like.dtype
        and weights.shape == (n_out,)
        and not weights.requires_grad
    ):
        raise NotServed("the loss's class weights are not of the output's dtype, one a class")
