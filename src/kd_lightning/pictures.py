"""Pictures for TensorBoard: what goes into a training, and what it confuses in the end."""

from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid

from kd_lightning import plots
from kd_lightning.data.module import ImageDataModule
from kd_lightning.distillation import DistillationModule


class Pictures(Callback):
    """A page of augmented training images at the start, a confusion matrix at the end."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw eight training images, eight views of each."""
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            page = page_of_views(_data(trainer))
            trainer.logger.experiment.add_image("training views", page)

    def on_test_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw the confusion matrix."""
        counts = cast(DistillationModule, module).confusion.compute().cpu()
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            figure = plots.confusion_matrix(counts.numpy(), _data(trainer).classes)
            trainer.logger.experiment.add_figure("test/confusion", figure, trainer.current_epoch)


def page_of_views(data: ImageDataModule, rows: int = 8, columns: int = 8) -> Tensor:
    """Training images as a model sees them: one image a row, one of its views a column.

    Returns:
        (3, height, width) in [0, 1].
    """
    index = data.splits["train"][:: max(1, len(data.splits["train"]) // rows)][:rows]
    view = torch.arange(columns).repeat(len(index))
    mean, std = torch.tensor((data.mean, data.std)).view(2, 1, 3, 1, 1)
    images = data.render(index.repeat_interleave(columns), view)["images"].cpu() * std + mean
    return make_grid(images, nrow=columns, padding=2, pad_value=1.0)


def _data(trainer: Trainer) -> ImageDataModule:
    return cast(ImageDataModule, trainer.datamodule)  # type: ignore[attr-defined]
