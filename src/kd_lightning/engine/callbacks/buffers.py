"""The buffers of rank 0 in every process, for validation."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed, nn

from kd_lightning.distill.module import DistillationModule


class SameBuffers(Callback):
    """Gives every process the student's buffers of rank 0 before a validation.

    The running statistics of BatchNorm are those of a process's own batches until the next training
    step, and those of rank 0 are saved.
    """

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Broadcast the buffers; outside of training, Lightning does."""
        if trainer.world_size > 1 and trainer.state.fn == TrainerFn.FITTING:
            broadcast_buffers(cast(DistillationModule, module).student)


def broadcast_buffers(network: nn.Module) -> None:
    """Give every process the buffers of rank 0."""
    for buffer in network.buffers():
        distributed.broadcast(buffer, 0)
