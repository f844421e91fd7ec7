"""Training speed: images per second and total seconds."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.transfer import synchronize


class Speed(Callback):
    """Logs ``images_per_second`` of every epoch, excluding validation.

    Attributes:
        images: number of training images processed so far, over all processes and epochs.
        seconds: time spent on training steps.
        fit_seconds: total time until the last checkpoint, including validation and interrupted
            attempts.
    """

    def __init__(self) -> None:
        self.images, self.seconds, self.fit_seconds = 0, 0.0, 0.0
        self._restart()
        self._fit_began = self._clock_began
        self._processes = 1

    @property
    def images_per_second(self) -> float:
        """Average over the whole training."""
        return self.images / self.seconds

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock of the whole training."""
        self._fit_began = time.perf_counter()
        self._processes = trainer.world_size

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock, as a resumed epoch has no `on_train_epoch_start`."""
        self._restart()

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock."""
        self._restart()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images."""
        self._clock_images += len(batch["labels"])

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop the clock: during training this follows a step."""
        self._stop(module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Restart the clock, as the epoch may continue."""
        self._clock_began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop the clock, unless a validation already has; a checkpoint may have, too."""
        self._stop(module)

    def state_dict(self) -> dict[str, Any]:
        """The totals up to now."""
        now = time.perf_counter()
        self.fit_seconds += now - self._fit_began
        self._fit_began = now
        self._count()
        return {name: getattr(self, name) for name in ("images", "seconds", "fit_seconds")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the totals."""
        for name in ("images", "seconds", "fit_seconds"):
            setattr(self, name, state_dict[name])

    def _restart(self) -> None:
        """Start the clock, of a new epoch."""
        self._clock_began, self._clock_images = time.perf_counter(), 0
        self._epoch_images, self._epoch_seconds, self._unlogged = 0, 0.0, False

    def _stop(self, module: LightningModule) -> None:
        if self._clock_images:
            synchronize(module.device)  # include pending work
        self._count()
        if self._unlogged:
            rate = self._epoch_images / self._epoch_seconds
            module.log("images_per_second", rate, sync_dist=True)
            self._unlogged = False

    def _count(self) -> None:
        """Add what the clock has measured to the totals and to the epoch; restart the clock."""
        now = time.perf_counter()
        images, seconds = self._clock_images * self._processes, now - self._clock_began
        if images:
            self.images, self.seconds = self.images + images, self.seconds + seconds
            self._epoch_images += images
            self._epoch_seconds += seconds
            self._unlogged = True
        self._clock_began, self._clock_images = now, 0
