"""Stops a diverged training before a checkpoint is written."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kd_lightning.distill.divergence import LossWatch, first_not_finite, trainable
from kd_lightning.distill.module import DistillationModule
from kd_lightning.errors import RunError


class StopWhenDiverged(Callback):
    """Raises an error if a loss or a weight is not finite.

    On a CPU the losses are checked at every step, on an accelerator, where a check synchronises,
    every `log_every_n_steps` steps; in addition at the end of every epoch and before every
    checkpoint. A non-finite value in one process reaches all of them a step later; rank 0 reports
    it.
    """

    def __init__(self) -> None:
        self._watch, self._look_every_step = LossWatch(), True
        self._batch: Any = None

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Reset."""
        self._watch = LossWatch(scaled=str(trainer.precision) == "16-mixed")
        self._look_every_step = module.device.type == "cpu"

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch, to determine the cause of a non-finite loss."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        """Check the losses before they change the weights, if due."""
        if not trainer.is_global_zero:
            return
        losses = cast(DistillationModule, module).step_losses
        self._watch.note(losses, torch.stack([*losses.values()]))
        due = trainer.global_step % cast(Any, trainer).log_every_n_steps == 0
        if (due or self._look_every_step) and not self._watch.scaled:
            self._report(self._watch.look(), cast(DistillationModule, module), self._batch)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Check before the weights may be saved as the best."""
        if trainer.state.fn == "fit":
            self.check(cast(DistillationModule, module))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Check at the end of every epoch."""
        self.check(cast(DistillationModule, module))

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check before a checkpoint is written."""
        self.check(cast(DistillationModule, module))

    def check(self, module: DistillationModule) -> None:
        """Check the losses since the last check, and the weights.

        Raises:
            RunError: one is not finite.
        """
        self._report(self._watch.look(), module)
        name = first_not_finite(trainable(module))
        if name is not None:
            raise RunError(
                f"the weights are not finite after step {module.global_step} (first: {name}); "
                "lower the learning rate"
            )

    def _report(self, bad: Sequence[str], module: DistillationModule, batch: Any = None) -> None:
        if not bad:
            return
        place = f"{'by' if batch is None else 'at'} step {module.global_step}"
        if batch is not None and module.teacher is not None:
            for name, values in module.targets(batch).items():
                tensors = [values] if isinstance(values, Tensor) else values.values()
                if not all(tensor.isfinite().all() for tensor in tensors):
                    raise RunError(
                        f"the teacher's outputs are not finite {place} (term: {name}): check "
                        "teacher.checkpoint, teacher.mean and teacher.std"
                    )
        raise RunError(
            f"the loss is not finite {place} (term: {', '.join(bad)}); "
            "lower the learning rate or its weight"
        )
