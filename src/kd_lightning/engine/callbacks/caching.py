"""Flushing of the teacher-output caches."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.distill.module import DistillationModule


class FlushCaches(Callback):
    """Waits, once per epoch, for outputs that are still being copied from the device."""

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the outputs on training views."""
        if (cache := cast(DistillationModule, module).cache) is not None:
            cache.flush()

    def on_test_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the outputs on unaugmented images."""
        if (cache := cast(DistillationModule, module).evaluation_cache) is not None:
            cache.flush()
