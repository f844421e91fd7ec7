"""Logging of losses and learning rate per step."""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kd_lightning.transfer import ToHost


class Curves(Callback):
    """Logs the losses and the learning rate of every nth step and of the last step of each epoch.

    Values are logged at the step in which they were computed; `LightningModule.log` writes them at
    a later one. With gradient accumulation, a loss is the mean over the batches of its step; with
    several processes, the mean over the processes, weighted by their parts of the batch. On an
    accelerator, values are written once they have arrived on the host.

    n is the trainer's `log_every_n_steps`. The training step returns its losses, detached, as
    ``losses``: name to scalar.
    """

    def __init__(self) -> None:
        self._step = -1
        self._rates: dict[str, float | Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._logged = -1
        self._coming: tuple[int, list[str], dict[str, float | Tensor], ToHost] | None = None

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the learning rate before the scheduler changes it."""
        if trainer.global_step != self._step:
            self._step, self._sums, self._batches = trainer.global_step, {}, 0
            self._rates = _learning_rates(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Accumulate the losses; log them if the step is complete and due."""
        losses: dict[str, Tensor] = (outputs or {}).get("losses", {})
        if trainer.world_size > 1:
            losses = {name: value * batch["loss_weight"] for name, value in losses.items()}
        if self._batches:
            losses = {name: value + self._sums[name] for name, value in losses.items()}
        self._sums, self._batches = losses, self._batches + 1
        if self._step % cast(Any, trainer).log_every_n_steps == 0:
            self._log(trainer)
        if self._coming is not None and self._coming[-1].ready():
            self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the last step of the epoch: any epoch may be the last one."""
        self._log(trainer)
        self._write(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Flush, because a resumed training does not log these values again."""
        self._write(trainer)

    def _log(self, trainer: Trainer) -> None:
        complete = trainer.global_step > self._step
        if not self._sums or not complete or self._step == self._logged:
            return
        mean = torch.stack([*self._sums.values()]).float() / self._batches
        mean = cast(Tensor, trainer.strategy.reduce(mean, reduce_op="mean"))
        self._write(trainer)
        self._logged = self._step
        self._coming = (self._step, [*self._sums], self._rates, ToHost(mean))

    def _write(self, trainer: Trainer) -> None:
        """Write pending values, if any, waiting for them if necessary."""
        if self._coming is None:
            return
        (step, names, rates, mean), self._coming = self._coming, None
        values = dict(zip(names, mean.wait().tolist(), strict=True))
        values |= {name: float(rate) for name, rate in rates.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
            logger.save()


def _learning_rates(trainer: Trainer) -> dict[str, float | Tensor]:
    """`lr-SGD` to its value; with several parameter groups `lr-SGD/pg1` etc."""
    rates: dict[str, float | Tensor] = {}
    for optimizer in trainer.optimizers:
        groups = optimizer.param_groups
        for number, group in enumerate(groups, start=1):
            suffix = f"/pg{number}" if len(groups) > 1 else ""
            rate = group["lr"]
            # A tensor is modified in place, and reading it may synchronise with the device.
            rates[f"lr-{type(optimizer).__name__}{suffix}"] = (
                rate.clone() if isinstance(rate, Tensor) else rate
            )
    return rates
