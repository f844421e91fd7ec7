"""Pictures for TensorBoard: what goes into a training, and what it confuses in the end."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from kd_lightning import plots
from kd_lightning.data.module import ImageDataModule
from kd_lightning.distillation import DistillationModule


class Pictures(Callback):
    """A page of augmented training images at the start, a confusion matrix at the end."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw eight training images, eight views of each."""
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            page = plots.page_of_views(_data(trainer))
            trainer.logger.experiment.add_image("training views", page)

    def on_test_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw the confusion matrix."""
        counts = cast(DistillationModule, module).confusion.compute().cpu()
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            figure = plots.confusion_matrix(counts, _data(trainer).classes)
            trainer.logger.experiment.add_figure("test/confusion", figure, trainer.current_epoch)


def _data(trainer: Trainer) -> ImageDataModule:
    return cast(ImageDataModule, trainer.datamodule)  # type: ignore[attr-defined]
