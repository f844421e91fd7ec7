"""Checks of augmentation and mixing, which may be a user's own, on a few views."""

from typing import Any

import torch
from torch import Tensor

from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.views import PLAIN
from kd_lightning.errors import InputError

CHECKED_IMAGES = 8
CHECKED_PARTNERS = 4096


def check_views(data: ImageDataModule) -> None:
    """Render a few training images, and check what the augmentation and the mixing return.

    Args:
        data: set up.

    Raises:
        InputError: the views have another type or shape, validation and test images would be
            changed, or mixing partners are not training images.
    """
    index = data.splits["train"][:CHECKED_IMAGES]
    images, rows = data.pixel_source.fetch(index)
    optional: dict[str, Any] = {"rows": rows, "size": data.view_size}
    given = {name: value for name, value in optional.items() if value is not None}
    if data.cannot_render(*given):
        return  # an error where it is needed, with the reason
    original = images[(index if rows is None else rows).to(images.device)].permute(0, 3, 1, 2)
    side = data.view_size
    size = tuple(original.shape[2:]) if side is None else (side, side)
    name = f"{type(data.augmentation).__name__}.render"
    for number in (PLAIN, 0):
        view = torch.full_like(index, number)
        found = data.augmentation.render(images, index, view, **given)
        wanted = (len(index), 3, *size)
        if found.dtype != torch.uint8 or tuple(found.shape) != wanted:
            raise InputError(
                f"{name} must return {_words(torch.uint8, wanted)} for {len(index)} images, not "
                f"{_words(found.dtype, tuple(found.shape))}"
            )
        if number == PLAIN and side is None and not torch.equal(found, original):
            raise InputError(
                f"{name} changes validation and test images: where view is PLAIN, it must return "
                "the original image"
            )
    if data.mixing is not None:
        _check_mixing(data, size)


def _words(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"


def _check_mixing(data: ImageDataModule, size: tuple[int, ...]) -> None:
    assert data.mixing is not None
    train = data.splits["train"]
    index = train[:CHECKED_PARTNERS]
    name = f"{type(data.mixing).__name__}.mixture"
    mixture = data.mixing.mixture(index, torch.zeros_like(index), train, (size[0], size[1]))
    partner, ratio = mixture.partner, mixture.ratio
    if not _is_list(partner, index) or not torch.isin(partner.cpu(), train).all():
        raise InputError(
            f"{name}: each partner must be one of the training images that it is given"
        )
    if not _is_list(ratio, index) or not ((ratio >= 0) & (ratio <= 1)).all():
        raise InputError(f"{name}: the ratio of each image must be in [0, 1]")


def _is_list(values: Any, index: Tensor) -> bool:
    return isinstance(values, Tensor) and values.shape == index.shape
