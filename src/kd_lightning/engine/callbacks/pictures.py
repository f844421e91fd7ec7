"""Logged figures: training views, the confusion matrix and the reliability diagram."""

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.utils import make_grid

from kd_lightning.data.module import ImageDataModule
from kd_lightning.distill.module import DistillationModule
from kd_lightning.engine.loggers import log_image
from kd_lightning.reports import plots
from kd_lightning.reports.quality_plots import reliability_diagram

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_VIEW = 128
"""Maximum size of a displayed view, in pixels; larger ones are downscaled."""


class Pictures(Callback):
    """Logs a grid of augmented training images at the start, a confusion matrix and a reliability
    diagram at the end.

    A figure that cannot be drawn causes a warning, not a failed run.
    """

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw eight views of each of eight training images."""
        if trainer.is_global_zero:
            with plots.optional("the grid of training views"):
                page = page_of_views(_data(trainer)).permute(1, 2, 0)
                log_image(trainer.loggers, "training views", page.numpy())

    def on_test_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw the confusion matrix and the reliability diagram."""
        # In all processes: each has counted a part of the images.
        tested = cast(DistillationModule, module)
        counts, bins = tested.confusion.compute(), tested.quality.reliability()
        if trainer.is_global_zero:
            with plots.optional("the figure of the confusion matrix"):
                figure = plots.confusion_matrix(counts.cpu().numpy(), _data(trainer).classes)
                _add(trainer, "test/confusion", figure)
            with plots.optional("the reliability diagram"):
                import pandas as pd

                rows = [{k: None if v == "" else v for k, v in row.items()} for row in bins]
                table = pd.DataFrame(rows)
                _add(trainer, "test/reliability", reliability_diagram(table))


def _add(trainer: Trainer, name: str, figure: "Figure") -> None:
    log_image(trainer.loggers, name, plots.pixels(figure), trainer.current_epoch)


def page_of_views(data: ImageDataModule, rows: int = 8, columns: int = 8) -> Tensor:
    """A grid of training views: one row per image, one column per view.

    Returns:
        (3, height, width) in [0, 1], with views of at most `LARGEST_VIEW` pixels.
    """
    index = data.splits["train"][:: max(1, len(data.splits["train"]) // rows)][:rows]
    view = torch.arange(columns)
    mean, std = torch.tensor((data.mean, data.std)).view(2, 1, -1, 1, 1)
    parts = []
    for image in index:  # row by row, to limit memory
        images = data.render(image.repeat(columns), view)["images"].cpu() * std + mean
        longest = max(images.shape[2:])
        if longest > LARGEST_VIEW:
            size = [max(1, side * LARGEST_VIEW // longest) for side in images.shape[2:]]
            images = F.interpolate(images, size, mode="area")
        parts.append(images)
    return make_grid(torch.cat(parts), nrow=columns, padding=2, pad_value=1.0)


def _data(trainer: Trainer) -> ImageDataModule:
    return cast(ImageDataModule, trainer.datamodule)  # type: ignore[attr-defined]
