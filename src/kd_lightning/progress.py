"""One progress bar for a whole training, silent when nobody watches."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


class ProgressBar(Callback):
    """A bar over all training steps, with the epoch, validation accuracy and speed beside it.

    On a terminal the bar moves; elsewhere nothing is printed. Either way every epoch leaves a line
    in the log file.

    Args:
        title: what is trained.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Show the bar."""
        console = Console(stderr=True)
        if not (console.is_terminal and trainer.is_global_zero):
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # Drawing takes a core away from training; twice a second is enough to look alive.
            refresh_per_second=2,
        )
        total = trainer.estimated_stepping_batches
        self._task = self._bar.add_task(
            self.title, total=total, completed=trainer.global_step, state=""
        )
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on by a step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Say how the epoch went."""
        metrics = trainer.callback_metrics
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        if "val/accuracy" in metrics:  # not every epoch need end with a validation
            parts.append(f"val {100 * float(metrics['val/accuracy']):.2f} %")
        if "images_per_second" in metrics:
            parts.append(f"{float(metrics['images_per_second']):,.0f} images/s")
        state = "  ".join(parts)
        log.info("%s: %s", self.title, state)
        if self._bar is not None:
            self._bar.update(self._task, state=state)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the bar away."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
