"""Ctrl-C and SIGTERM end a training after the step it is in, with a sentence on how to go on."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopWhenAsked(Callback):
    """Raises `Stopped` after the training step in which the process was asked to end.

    What was trained since the last whole epoch is given up: its checkpoint is where the same
    command goes on, to the same weights as if nothing had been. Asked a second time, the process
    ends at once.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
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
        """The step is complete."""
        if self._asked is not None:
            raise Stopped(self._asked, trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Listen no more."""
        self._leave()
        if self._asked is not None:  # while the last epoch was validated
            raise Stopped(self._asked, trainer.current_epoch)

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """Listen no more."""
        self._leave()

    def _leave(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
