"""Lets a `MeanTeacher` follow the student."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.distill.mean_teacher import MeanTeacher
from kd_lightning.distill.module import DistillationModule
from kd_lightning.engine.callbacks.buffers import broadcast_buffers


class FollowStudent(Callback):
    """Updates the teacher after every optimizer step; its weights are part of the checkpoints."""

    def __init__(self, teacher: MeanTeacher) -> None:
        self._teacher = teacher
        self._steps = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start with the student's initial weights, unless resumed."""
        if not self._steps:
            self._teacher.load(cast(DistillationModule, module).student.state_dict())

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the teacher after an optimizer step."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            student = cast(DistillationModule, module).student
            if trainer.world_size > 1:
                # Each process has BatchNorm statistics of its own batches; the checkpoint contains
                # rank 0's average.
                broadcast_buffers(student)
            self._teacher.follow(student, self._steps)

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the teacher."""
        weights = self._teacher.model.state_dict()
        checkpoint["mean_teacher"] = {"weights": weights, "steps": self._steps}

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the teacher."""
        saved = checkpoint["mean_teacher"]
        self._teacher.load(saved["weights"])
        self._steps = saved["steps"]
