"""Ctrl-C and SIGTERM end a training after the step it is in, with a sentence on how to go on."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.errors import Stopped
from kd_lightning.runs import Checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopWhenAsked(Callback):
    """Saves where the training is and raises `Stopped`, once the process was asked to end.

    The step in which it was asked is finished, and so is a validation that is due after it; the
    same command then goes on with the next step, to the same weights as if nothing had been.
    Several processes that train together go on after the last whole epoch instead: each has counted
    its own part of this one. Asked a second time, the process ends at once.

    Args:
        what: is trained, for people.
        path: the checkpoint that is gone on from.
    """

    def __init__(self, what: str, path: Path) -> None:
        self._what, self._path = what, path
        self._asked: int | None = None
        self._saved = 0  # batches of the epoch that are in the checkpoint
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Listen, in the process that speaks for all."""
        if trainer.is_global_zero and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._asked = number

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if nothing is left half done: no validation is due, no gradient is kept."""
        if self._asked is None:
            return
        if trainer.world_size > 1:
            self._stop(trainer)
        done = batch_idx + 1
        counted = done if trainer.check_val_every_n_epoch else trainer.fit_loop.total_batch_idx + 1
        validates = trainer.is_last_batch or counted % (trainer.val_check_batch or 1) == 0
        if not validates and done % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self._path, weights_only=False)
            self._saved = done

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The step before is saved, and what was logged of it is written."""
        if self._saved:
            self._stop(trainer)

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The epoch before is saved."""
        if self._asked is not None:
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Listen no more."""
        self._leave()
        if self._asked is not None:  # in the last epoch's last step, or in its validation
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        assert self._asked is not None
        epochs, steps = trainer.current_epoch, trainer.global_step
        come = Checkpoint(self._path, epochs, steps, self._saved)
        raise Stopped(self._asked, self._what, come.place if epochs or self._saved else None)

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """Listen no more."""
        self._leave()

    def _leave(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
