"""What the demo hangs on the Trainer: a bar with the last loss beside it."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """One bar for the training steps, then one for the batches of the evaluation."""

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._training = self._evaluation = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._training = self._progress.add_task(
            f"{self._title}: training", total=state.max_steps, loss=""
        )
        self._progress.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._progress.update(self._training, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self._progress.update(self._training, loss=f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._progress.stop()

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        if self._evaluation is None:
            self._evaluation = self._progress.add_task(
                f"{self._title}: evaluation", total=len(eval_dataloader), loss=""
            )
            self._progress.start()
        self._progress.advance(self._evaluation)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._progress.stop()
        self._evaluation = None
