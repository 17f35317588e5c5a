"""One step of training: a kernel's where it is sure to be torch's, torch's own loop elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import _products, ops
from fastattn.functional._autograd import kernel, transforming
from fastattn.functional._served import ordinary, unobserved
from fastattn.functional._torch_internals import note_step, packs_saved_tensors
from fastattn.nn._plain import no_global_hooks
from fastattn.training._loss import check_targets, read_loss
from fastattn.training._network import Network
from fastattn.training._optimizer import Updates
from fastattn.training._unknown import NotServed


class TrainingStep:
    """``step(inputs, labels)`` trains a model by one step and returns the loss before it.

    It stands for the five lines of torch's loop::

        optimizer.zero_grad()
        loss = loss_function(model(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    Where the model is a chain of linear layers and ReLUs, a step is a single call of a kernel that
    changes the model's own parameters and the optimizer's own state. The step looks at the model,
    the loss and the optimizer before each call. It runs torch's loop for all that it does not
    know, and says why in ``reason``. An optimizer with a state makes it in its first step, which
    therefore is torch's.

    What the kernel takes:

    - models: ``nn.Sequential``, ``fastattn.nn.MLP`` and modules of one's own whose forward is a
      chain: flatten or view of the input, ``nn.Linear``, ReLU (module or function), ...; float32 or
      float64, on a CPU, without hooks, frozen or shared parameters;
    - losses: ``nn.CrossEntropyLoss`` of class indices and ``nn.MSELoss``, of any options but
      ``reduction="none"``, and their functions;
    - optimizers: ``SGD``, ``Adam``, ``AdamW`` and ``RMSprop`` of ``torch.optim`` with exactly the
      model's parameters, in any groups, with hyperparameters that are numbers. Learning rate
      schedulers, ``state_dict`` and ``load_state_dict`` work as always.

    After a step ``parameter.grad`` is None for the optimizer's parameters, as after
    ``zero_grad(set_to_none=True)``.

    Args:
        model: any ``nn.Module``.
        loss: called as ``loss(model(inputs), labels)``; it gives a scalar.
        optimizer: of the model's parameters.

    Raises:
        TypeError: an argument is none of these.

    >>> import torch, fastattn
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> step = fastattn.training.TrainingStep(model, nn.CrossEntropyLoss(), optimizer)
    >>> images, labels = torch.rand(64, 784), torch.randint(10, (64,))
    >>> losses = [float(step(images, labels)) for _ in range(20)]
    >>> losses[-1] < losses[0], step.reason
    (True, None)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if not callable(loss):
            raise TypeError(f"loss: expected a function or module, got {type(loss).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            kind = type(optimizer).__name__
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {kind}")
        self._model, self._loss, self._optimizer = model, loss, optimizer
        self.reason: str | None = "no step was made yet"
        """Why the last step ran torch's loop; None where it was the kernel's."""
        self._network: Network | None = None
        self._unread: str | None = None  # why the model is not read at the next calls,
        self._pause = self._left = 0  # how many these are, and how many are left
        self._updates = Updates(optimizer)

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self._model

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss."""
        return self._loss

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the model's parameters."""
        return self._optimizer

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, and a pickle, reads its model anew."""
        return type(self), (self._model, self._loss, self._optimizer)

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Trains the model on one batch.

        Args:
            inputs: the model's input, for the kernel ``[batch, ...]`` of the parameters' dtype.
            labels: what the loss takes beside the model's output: class indices ``[batch]``, or
                targets of the output's shape.

        Returns:
            The loss of the batch before the step, without a graph.

        Raises:
            IndexError: a label is no class; model and optimizer are then as they were. As every
                other error it is torch's own.
        """
        found = self._prepared(inputs, labels)
        if found is None:
            return self._torchs(inputs, labels)
        network, x, options = found
        for p in network.trained:
            if p.grad is not None:
                p.grad = None
        states = self._updates.states
        try:
            loss = kernel(
                ops.training_step, x, labels, network.parameters, states, self._updates.rules,
                network.relus, self._updates.number, options,
            )  # fmt: skip
        except RuntimeError as error:
            if "cannot allocate" in str(error):
                raise  # it may be in the middle of the step
            self.reason = f"the kernel refused: {error}"
            return self._torchs(inputs, labels)
        torch.autograd.graph.increment_version(network.trained + states)
        note_step(self._optimizer)
        return loss

    def _prepared(
        self, inputs: Tensor, labels: Tensor
    ) -> tuple[Network, Tensor, ops.LossOptions] | None:
        """All that the kernel needs, or None; ``reason`` says why."""
        try:
            found = self._prepare(inputs, labels)
        except NotServed as error:
            self.reason = str(error)
            return None
        self.reason = None
        return found

    def _prepare(self, inputs: Tensor, labels: Tensor) -> tuple[Network, Tensor, ops.LossOptions]:
        """All that the kernel needs; raises NotServed where it may not stand in."""
        _check_modes()
        network = self._network
        if network is None or not network.holds():
            self._network = None
            self._network = network = self._read()
        options = read_loss(self._loss)
        x = _rows(network, inputs)
        rows = x.shape[0]
        if rows * network.weights > _products.most_trained():
            raise NotServed("the network is large: torch's loop is as fast")
        check_targets(options, labels, rows, network.n_out, x)
        self._updates.prepare(network)
        return network, x, options

    def _read(self) -> Network:
        """The model as it is. A model of other code is read seldom, as reading takes time: after 1,
        2, 4 ... steps, at most 64."""
        if self._unread is not None and self._left > 0:
            self._left -= 1
            raise NotServed(self._unread)
        try:
            network = Network(self._model)
        except NotServed as error:
            self._unread = str(error) if error.lasting else None
            self._pause = self._left = min(64, 2 * self._pause or 1) if error.lasting else 0
            raise
        self._unread, self._pause = None, 0
        return network

    def _torchs(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._loss(self._model(inputs), labels)
        loss.backward()
        self._optimizer.step()
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        return loss.detach()


def _check_modes() -> None:
    """Raises NotServed where torch's operations mean more than their results."""
    if torch.compiler.is_compiling() or not unobserved():
        raise NotServed("torch's operations are watched or recorded")
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise NotServed("gradients are off")
    if torch.is_autocast_enabled("cpu"):
        raise NotServed("autocast is on")
    if torch.is_anomaly_enabled() or packs_saved_tensors() or transforming():
        raise NotServed("anomaly mode, hooks of saved tensors, or a transform of torch.func is on")
    if not no_global_hooks():
        raise NotServed("a hook is registered for all modules")


def _rows(network: Network, inputs: Tensor) -> Tensor:
    """The input of the first layer."""
    if not isinstance(inputs, Tensor) or not ordinary(inputs) or not inputs.is_cpu:
        raise NotServed("the input is no ordinary tensor on the CPU")
    if inputs.dtype != network.dtype or inputs.requires_grad:
        raise NotServed("the input is not of the parameters' dtype, or requires a gradient")
    if inputs.is_inference():
        raise NotServed("the input is of inference mode")
    x = inputs
    for reshape in network.reshapes:
        try:
            x = reshape(x)
        except RuntimeError as error:
            raise NotServed(f"the input cannot be reshaped: {error}") from None
    if x.dim() != 2 or x.shape[1] != network.n_in or x.shape[0] == 0:
        raise NotServed(f"the input is not of shape [batch, {network.n_in}] when it is flat")
    return x
