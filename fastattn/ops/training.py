"""A step of training as one op: input ``[M, K]``, weights ``[N, K]``, biases ``[N]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Their places are their numbers in the op.
OPTIMIZERS = ("sgd", "adam", "rmsprop")
LOSSES = ("cross_entropy", "mse")


class Rule(NamedTuple):
    """One row of ``rules``: a parameter's hyperparameters, as ``UpdateRule`` in csrc has them."""

    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.0  # SGD, RMSprop; Adam's beta1
    decay: float = 0.0  # RMSprop's alpha, Adam's beta2, SGD's dampening
    eps: float = 0.0  # Adam, RMSprop
    variant: bool = False  # SGD: nesterov; Adam: amsgrad; RMSprop: centered
    maximize: bool = False
    decoupled: bool = False  # Adam: AdamW's weight decay


class LossOptions(NamedTuple):
    """A loss with what its call takes beside the output and the targets."""

    name: str
    mean: bool = True  # else the sum
    class_weights: Tensor | None = None  # [N of the last layer]
    ignore_index: int = -100
    label_smoothing: float = 0.0


def training_step(
    input: Tensor,
    targets: Tensor,
    parameters: list[Tensor],
    states: list[Tensor],
    rules: Tensor,
    relus: Sequence[bool],
    optimizer: int,
    loss: LossOptions,
) -> Tensor:
    """Forward, loss, backward and update; returns the loss before the update.

    ``parameters`` are weight, bias, weight, bias, ...; an absent bias has shape ``[0]``. ``relus``
    tells which layers a ReLU follows. ``rules`` are float64, ``[2 L, 8]``, one ``Rule`` a
    parameter. ``states`` are those of the first parameter, of the second, ...: for SGD the momentum
    buffer; for Adam the step, the mean, the mean square and with amsgrad its maximum; for RMSprop
    the step, the mean square, with momentum its buffer, centered the mean. What a rule does not
    use is left out. Parameters and states change in place; all of them, or none where an argument
    is refused.
    """
    return torch.ops.fastattn.training_step(
        input, targets, parameters, states, rules, relus, optimizer, LOSSES.index(loss.name),
        loss.mean, loss.class_weights, loss.ignore_index, loss.label_smoothing,
    )  # fmt: skip


def _fake_training_step(input, *_):
    return input.new_empty(())


torch.library.register_fake("fastattn::training_step", _fake_training_step)
