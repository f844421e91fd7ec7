"""Random crops with a black border, as in the literature on CIFAR."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_lightning.data.views import Augmentation
from kd_lightning.transfer import to_device


@dataclass(frozen=True)
class ZeroPadding(Augmentation):
    """`Augmentation` whose crops are filled with zeros outside the image, not by reflection.

    Like torchvision's ``RandomCrop(size, padding)`` and ``RandomHorizontalFlip()``. Arguments as of
    `Augmentation`; crops and flips are the same.
    """

    def render(
        self,
        images: Tensor,
        index: Tensor,
        view: Tensor,
        rows: Tensor | None = None,
        size: int | None = None,
    ) -> Tensor:
        """Render views; arguments and result as of `Augmentation.render`."""
        views = super().render(images, index, view, rows, size)
        (height, width), (tall, wide) = images.shape[1:3], views.shape[2:]
        index, view = to_device(index, views.device), to_device(view, views.device)
        top, left, flip = self.parameters(index, view, height - tall)
        row = torch.arange(tall, device=views.device)
        column = torch.arange(wide, device=views.device)
        column = torch.where(flip[:, None], wide - 1 - column, column)
        inside_rows = _inside(top[:, None] - self.padding + row, height)
        inside_columns = _inside(left[:, None] - self.padding + column, width)
        inside = inside_rows[:, :, None] & inside_columns[:, None, :]
        return views.masked_fill_(~inside[:, None], 0)


def _inside(position: Tensor, size: int) -> Tensor:
    return (position >= 0) & (position < size)
