"""Writes the teacher's outputs that are on their way to the cache."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.distill.module import DistillationModule


class FlushCaches(Callback):
    """Waits, once an epoch, for outputs that are still being copied from the device."""

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the outputs on training views."""
        if (cache := cast(DistillationModule, module).cache) is not None:
            cache.flush()

    def on_test_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the outputs on images as they are."""
        if (cache := cast(DistillationModule, module).evaluation_cache) is not None:
            cache.flush()
