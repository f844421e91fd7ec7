"""Graceful stop after Ctrl-C or SIGTERM."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kd_lightning.engine.agreement import Agreement
from kd_lightning.engine.worker import ask_parent, tell_training
from kd_lightning.errors import Stopped
from kd_lightning.storage.run_directory import Checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopWhenAsked(Callback):
    """Saves a checkpoint and raises `Stopped` after Ctrl-C or SIGTERM.

    The current step, and a validation due after it, are finished first; the same command resumes
    at the next step and ends with the same weights as an uninterrupted training. The workers of a
    distributed training stop after the same batch (`engine.agreement`); their parent receives the
    signals. A second signal ends the process immediately.

    Args:
        what: human-readable name of the training, for messages.
        path: path of the checkpoint to resume from.
    """

    def __init__(self, what: str, path: Path) -> None:
        self._what, self._path = what, path
        self._noted: int | None = None
        self._agreement: Agreement | None = None
        self._saved = 0  # number of batches of the epoch in the checkpoint
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Install the signal handlers."""
        self._agreement = tell_training(True)
        if threading.current_thread() is threading.main_thread():
            # Lightning's own handler communicates with the other processes in mid-step.
            handler = self._note if self._agreement is None else self._pass_on
            self._before = {number: signal.signal(number, handler) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._noted = number

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        ask_parent(number)

    @property
    def _asked(self) -> int | None:
        """The number of the signal; None if there was none."""
        return self._noted if self._agreement is None else self._agreement.signal

    @property
    def _due(self) -> bool:
        """Whether the current batch is to be the last one."""
        return self._asked is not None and (self._agreement is None or self._agreement.due)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless a validation is due or gradients are being accumulated."""
        if not self._due:
            return
        done = batch_idx + 1
        counted = done if trainer.check_val_every_n_epoch else trainer.fit_loop.total_batch_idx + 1
        every = trainer.val_check_batch  # None: at intervals of time
        validates = trainer.is_last_batch or (every is not None and counted % every == 0)
        if not validates and done % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self._path, weights_only=False)
            self._saved = done

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop if the previous step is saved; its metrics are logged by now."""
        if self._saved:
            self._stop(trainer)
        if self._agreement is not None:
            self._agreement.begin_batch()

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop if requested: the previous epoch is saved."""
        if self._due:
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Restore the signal handlers."""
        self._leave()
        if self._asked is not None:  # during the last step or validation
            self._stop(trainer)
        tell_training(False)

    def _stop(self, trainer: Trainer) -> None:
        assert self._asked is not None
        epochs, steps = trainer.current_epoch, trainer.global_step
        come = Checkpoint(self._path, epochs, steps, self._saved)
        raise Stopped(self._asked, self._what, come.place if epochs or self._saved else None)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop at once after a signal outside of the training: nothing is lost."""
        if trainer.state.fn != TrainerFn.FITTING and trainer.world_size == 1:
            self._stop_at_once()

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        """As `on_validation_start`."""
        self.on_validation_start(trainer, module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Restore the signal handlers."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._leave()

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Restore the signal handlers."""
        self._leave()

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the signal handlers."""
        self._leave()

    def _stop_at_once(self) -> None:
        def stop(number: int, frame: FrameType | None) -> NoReturn:
            raise Stopped(number, self._what)

        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, stop) for number in SIGNALS}

    def _leave(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` where Lightning ends the process after a signal, before and after training.

    It would end with the exit code 0, or 1 without a message.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SIGTERMException as error:
        raise Stopped(signal.SIGTERM) from error
    except KeyboardInterrupt as error:
        raise Stopped(signal.SIGINT) from error
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)  # Lightning ignores it from here on
        raise Stopped(signal.SIGINT) from error
