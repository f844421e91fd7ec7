"""Views: deterministic augmented versions (crop, flip) of an image.

A view is identified by (sample index, view number). Its crop offset and flip are a counter-based
hash of both and the augmentation seed, so a view is the same in every process, on every device,
after resuming and with any sampler. This is what makes it possible to cache the teacher's output
on a view.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.transfer import to_device

PLAIN = -1
"""View number of the original image: neither cropped nor flipped."""

GREY = 128
"""Value of cut-out pixels."""

_MASK = 0xFFFFFFFF


class Normalization(NamedTuple):
    """Per-channel mean and standard deviation of pixel values scaled to [0, 1]."""

    mean: Sequence[float]
    std: Sequence[float]


def check_seed(name: str, seed: object) -> None:
    """Reject seeds beyond 32 bits: truncated, here or by torch's CPU generator, two different seeds
    could silently give the same result.

    Raises:
        ValueError: the seed is out of range.
    """
    if not isinstance(seed, Integral) or not 0 <= int(seed) <= _MASK:
        raise ValueError(f"{name} must be a whole number from 0 to 2^32 - 1, not {seed}")


def _mix(x: Tensor) -> Tensor:
    """Hash 32-bit integers stored as int64 (the finaliser of MurmurHash3, Appleby 2011).

    Products of two 32-bit numbers overflow int64, but only above the 32 bits that are kept.
    """
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def counter_random(index: Tensor, view: Tensor, seed: int) -> Tensor:
    """Pseudo-random 32-bit integers, one for each (index, view, seed).

    Args:
        index: sample indices (B,), int64.
        view: view numbers (B,), int64.
        seed: 0 to 2^32 - 1.

    Returns:
        (B,) int64 in [0, 2^32).
    """
    state = _mix(torch.full_like(index, (seed ^ 0x9E3779B9) & _MASK))
    state = _mix(state ^ (index & _MASK))
    return _mix((state + (view & _MASK) * 0x9E3779B1) & _MASK)


class Views(Protocol):
    """Interface of classes that render views of images.

    A view must be a pure function of the image, its index, the view number and the renderer's
    settings, without any (random) state. The view `PLAIN` is the original image.
    """

    def render(
        self,
        images: Tensor,
        index: Tensor,
        view: Tensor,
        rows: Tensor | None = None,
        size: int | None = None,
    ) -> Tensor:
        """Render a batch of views.

        Args:
            images: (M, H, W, 3), uint8, on the training device: all images of the data set, or,
                with `rows`, some.
            index: image indices (B,), int64, on the CPU.
            view: view numbers (B,), int64, on the CPU; see `counter_random`.
            rows: position of each image in `images` (B,), int64, on the CPU; None: its index. A
                class without this parameter cannot render streamed images.
            size: height and width of the views, at most those of the images; None: the same. The
                view `PLAIN` is then the centre of the image. A class without this parameter cannot
                render images that are stored larger.

        Returns:
            (B, 3, H, W), uint8, channels-last in memory.
        """
        ...


@dataclass(frozen=True)
class Augmentation:
    """Random crops with reflection padding, horizontal flips and cutout.

    Args:
        padding: maximum shift of a crop beyond the image, in pixels; the border is filled by
            reflection.
        flip: whether half of the views are flipped horizontally.
        cutout: side of a random square that is made grey, in pixels (DeVries & Taylor 2017,
            "Improved Regularization of Convolutional Neural Networks with Cutout"); its centre is
            uniform over the image, so part of it may lie outside. 0: none.
        seed: seed of the views, 0 to 2^32 - 1.
    """

    padding: int = 4
    flip: bool = True
    cutout: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("padding", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more pixels, not {getattr(self, name)}")
        check_seed("seed", self.seed)

    def parameters(
        self, index: Tensor, view: Tensor, extra: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row offset, column offset (int64, 0 to 2 * padding + extra) and flip (bool), each (B,).

        `PLAIN` views have offset `padding` + `extra` // 2 and no flip: the original image, or its
        centre.

        Args:
            index: image indices (B,), int64.
            view: view numbers (B,), int64.
            extra: pixels by which the images are larger than the views.
        """
        bits = counter_random(index, view, self.seed)
        offsets = 2 * self.padding + extra + 1
        # The low bit for the flip; the rest, modulo a much smaller number, for the offsets.
        position = (bits >> 1) % (offsets * offsets)
        rows = position.div(offsets, rounding_mode="floor")
        plain = view == PLAIN
        return (
            torch.where(plain, self.padding + extra // 2, rows),
            torch.where(plain, self.padding + extra // 2, position % offsets),
            ((bits & 1) == 1) & ~plain & self.flip,
        )

    def render(
        self,
        images: Tensor,
        index: Tensor,
        view: Tensor,
        rows: Tensor | None = None,
        size: int | None = None,
    ) -> Tensor:
        """Render the views of a whole batch with a single gather.

        Args:
            images: (M, H, W, C), contiguous, any dtype.
            index: image indices (B,), int64.
            view: view numbers (B,), int64.
            rows: position of each image in `images` (B,), int64; None: its index.
            size: height and width of the views; None: those of the images. If the images are
                larger, crops are anywhere in them.

        Returns:
            (B, C, H, W), channels-last in memory, with the dtype of the images.

        Raises:
            InputError: the padding is not smaller than the images.
        """
        count, height, width, channels = images.shape
        if self.padding >= min(height, width):  # reflection would reach other images
            raise InputError(
                f"padding must be below the size of the images, {min(height, width)} pixels, not "
                f"{self.padding}"
            )
        index, view = to_device(index, images.device), to_device(view, images.device)
        tall, wide = (height, width) if size is None else (size, size)
        top, left, flip = self.parameters(index, view, height - tall)
        place = index if rows is None else to_device(rows, images.device)
        row = torch.arange(tall, device=index.device)
        column = torch.arange(wide, device=index.device)
        column = torch.where(flip[:, None], wide - 1 - column, column)
        row = _reflect(top[:, None] - self.padding + row, height)
        column = _reflect(left[:, None] - self.padding + column, width)
        # One index per pixel of the batch: int32 halves the memory traffic.
        small = torch.int32 if count * height * width < 2**31 else torch.int64
        first = ((place[:, None] * height + row) * width).to(small)
        pixels = first[:, :, None] + column.to(small)[:, None, :]
        batch = images.view(count * height * width, channels).index_select(0, pixels.flatten())
        batch = batch.view(len(index), tall, wide, channels)
        if self.cutout:
            erase(batch, index, view, self.cutout, self.seed)
        return batch.permute(0, 3, 1, 2)


def erase(images: Tensor, index: Tensor, view: Tensor, side: int, seed: int) -> None:
    """Make a random square of each view grey, in place (DeVries & Taylor 2017).

    Args:
        images: (B, H, W, C), uint8.
        index: image indices (B,), int64, on the device of the images.
        view: view numbers (B,), int64, on the same device; `PLAIN` views are not changed.
        side: side of the square, in pixels; its centre is uniform over the image.
        seed: seed of the centres.
    """
    height, width = images.shape[1:3]
    centre = counter_random(index, view, seed ^ 0x5BD1E995) % (height * width)
    first_row = centre.div(width, rounding_mode="floor") - side // 2
    first_column = centre % width - side // 2
    row = torch.arange(height, device=index.device) - first_row[:, None]
    column = torch.arange(width, device=index.device) - first_column[:, None]
    in_row = (row >= 0) & (row < side) & (view != PLAIN)[:, None]
    in_column = (column >= 0) & (column < side)
    images.masked_fill_((in_row[:, :, None] & in_column[:, None, :]).unsqueeze(3), GREY)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Reflect positions outside [0, size), without repeating the border pixel."""
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)
