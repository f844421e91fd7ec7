"""Progress display: a bar on a terminal, one line per epoch elsewhere."""

import logging
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from kd_lightning.reports.summary import about
from kd_lightning.terminal import console, printable, say, watched

log = logging.getLogger(__name__)

SECONDS = 5.0
"""Minimum interval between lines, in seconds; the last epoch is always printed."""


class ProgressBar(Callback):
    """Shows epoch, validation accuracy, speed and remaining time on standard error.

    On a terminal next to a progress bar over all training steps, otherwise one line per epoch.
    Every epoch is also logged to the log file.

    Args:
        title: human-readable name of the training.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._prints = False
        self._unprinted = ""
        self._began = self._printed = 0.0
        self._first_step = 0
        self._validated_at = -1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the bar, if on a terminal."""
        self._began = self._printed = time.monotonic()
        self._first_step = trainer.global_step
        self._prints = trainer.is_global_zero and not watched(error=True)
        if self._prints or not trainer.is_global_zero:
            return
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            console=console(error=True),
            transient=True,
            # Drawing competes with training for CPU time.
            refresh_per_second=2,
        )
        total = trainer.estimated_stepping_batches
        self._task = self._bar.add_task(
            printable(self.title, error=True),
            total=total, completed=trainer.global_step, state="",
        )  # fmt: skip
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Record the step of the validated weights."""
        self._validated_at = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log and show the results of the epoch."""
        metrics = trainer.callback_metrics
        epochs = trainer.max_epochs
        known = epochs is not None and epochs > 0
        parts = [f"epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if known else "")]
        # Not every epoch ends with a validation, and the metrics keep the earlier ones.
        if "val/accuracy" in metrics and self._validated_at == trainer.global_step:
            parts.append(f"val {100 * float(metrics['val/accuracy']):.2f} %")
        if "images_per_second" in metrics:
            parts.append(f"{float(metrics['images_per_second']):,.0f} images/s")
        state = ", ".join(parts)
        log.info("%s: %s", self.title, state)
        if self._bar is not None:
            self._bar.update(self._task, state=state)
        if self._prints:
            self._unprinted = f"{self.title}: {state}"
            if time.monotonic() - self._printed >= SECONDS:
                self._print(self._time_left(trainer))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Remove the bar; print the last epoch."""
        self._stop()
        self._print()

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the bar."""
        self._stop()

    def _print(self, more: str = "") -> None:
        if self._unprinted:
            say(self._unprinted + more, error=True)
            self._unprinted, self._printed = "", time.monotonic()

    def _time_left(self, trainer: Trainer) -> str:
        done = trainer.global_step - self._first_step
        rest = trainer.estimated_stepping_batches - trainer.global_step
        if done <= 0 or not 0 < rest < float("inf"):
            return ""
        return f", {about(rest * (time.monotonic() - self._began) / done)} left"

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
