"""Pictures: drawn with Matplotlib and Seaborn, imported only when a picture is wanted."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torchvision.utils import make_grid

from kd_lightning.data.module import ImageDataModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def confusion_matrix(counts: Tensor, classes: Sequence[str]) -> "Figure":
    """How often each class is taken for which: rows are the truth and sum to 100 %.

    Args:
        counts: (C, C) counts, [true class, predicted class].
        classes: names of the classes.
    """
    import seaborn
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    share = 100 * counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = 2.5 + 0.55 * len(classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    seaborn.heatmap(
        share.numpy(),
        ax=axes,
        annot=len(classes) <= 20,
        fmt=".0f",
        cmap="Blues",
        vmin=0,
        vmax=100,
        square=True,
        linewidths=0.5,
        xticklabels=classes,
        yticklabels=classes,
        cbar_kws={"label": "share of the true class (%)", "shrink": 0.8},
    )
    axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix, test set")
    axes.tick_params(axis="x", rotation=45)
    return figure


def page_of_views(data: ImageDataModule, rows: int = 8, columns: int = 8) -> Tensor:
    """Training images as a model sees them: one image a row, one of its views a column.

    Returns:
        (3, height, width) in [0, 1].
    """
    import torch

    index = data.splits["train"][:: max(1, len(data.splits["train"]) // rows)][:rows]
    view = torch.arange(columns).repeat(len(index))
    mean, std = torch.tensor((data.mean, data.std)).view(2, 1, 3, 1, 1)
    images = data.render(index.repeat_interleave(columns), view)["images"].cpu() * std + mean
    return make_grid(images, nrow=columns, padding=2, pad_value=1.0)
