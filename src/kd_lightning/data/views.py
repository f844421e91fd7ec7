"""Views: which crop and which flip of an image a model is shown.

A view is (sample index, view number) and nothing else. Its crop offset and flip follow from the
two and the augmentation seed by a counter-based rule, so a view is the same in every process, on
every device, after every resume and under every sampler. That is what makes it possible to store
what a teacher says about a view.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

PLAIN = -1
"""The view number of the image as it is: neither cropped nor flipped."""

GREY = 128
"""What cut-out pixels become."""

_MASK = 0xFFFFFFFF


class Normalization(NamedTuple):
    """Per-channel mean and standard deviation of pixel values scaled to [0, 1]."""

    mean: Sequence[float]
    std: Sequence[float]


def check_seed(name: str, seed: object) -> None:
    """Refuse seeds that would be cut to 32 bits, here or by torch's generator on the CPU: two of
    them would silently choose the same.

    Raises:
        ValueError: naming the seed.
    """
    if not isinstance(seed, Integral) or not 0 <= int(seed) <= _MASK:
        raise ValueError(f"{name} must be a whole number from 0 to 2^32 - 1, not {seed}")


def _mix(x: Tensor) -> Tensor:
    """Scatter 32-bit integers held in int64 (the finaliser of MurmurHash3, Appleby 2011).

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
    """What renders the views of images.

    A view is a pure function of the image, its index, the view number and the renderer's own
    settings: no random state, no state at all. The view `PLAIN` is the image as it is.
    """

    def render(self, images: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """Views of some images.

        Args:
            images: all images (N, H, W, 3), uint8, on the device that trains.
            index: which images (B,), int64.
            view: which view of each (B,), int64; see `counter_random`.

        Returns:
            (B, 3, H, W), uint8, channels-last in memory.
        """
        ...


@dataclass(frozen=True)
class Augmentation:
    """The family of views of an image: shifted crops, horizontal flips, and cut-out squares.

    Args:
        padding: how far a crop may be shifted, in pixels; the border is filled by reflection.
        flip: whether half of the views are mirrored left to right.
        cutout: side of a square somewhere in the image that is made grey, in pixels (DeVries &
            Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout");
            its centre is anywhere, so part of it may lie outside. 0: none.
        seed: chooses another set of views, 0 to 2^32 - 1.
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

    def parameters(self, index: Tensor, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row offset, column offset (int64, 0 to 2 * padding) and flip (bool), each (B,).

        `PLAIN` views have offset `padding` and no flip: the image as it is.
        """
        bits = counter_random(index, view, self.seed)
        offsets = 2 * self.padding + 1
        # The low bit for the flip; the rest, modulo a number far smaller, for the offsets.
        position = (bits >> 1) % (offsets * offsets)
        rows = position.div(offsets, rounding_mode="floor")
        plain = view == PLAIN
        return (
            torch.where(plain, self.padding, rows),
            torch.where(plain, self.padding, position % offsets),
            ((bits & 1) == 1) & ~plain & self.flip,
        )

    def render(self, images: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """Cut the views out of the images, a whole batch in one gather.

        Args:
            images: all images (N, H, W, C), contiguous, any type.
            index: which images (B,), int64.
            view: which view of each (B,), int64.

        Returns:
            (B, C, H, W), channels-last in memory, of the images' type.
        """
        count, height, width, channels = images.shape
        top, left, flip = self.parameters(index, view)
        row = torch.arange(height, device=index.device)
        column = torch.arange(width, device=index.device)
        column = torch.where(flip[:, None], width - 1 - column, column)
        rows = _reflect(top[:, None] - self.padding + row, height)
        columns = _reflect(left[:, None] - self.padding + column, width)
        # One number for every pixel of the batch: half as many bytes to write and read again.
        small = torch.int32 if count * height * width < 2**31 else torch.int64
        first = ((index[:, None] * height + rows) * width).to(small)
        pixels = first[:, :, None] + columns.to(small)[:, None, :]
        batch = images.view(count * height * width, channels).index_select(0, pixels.flatten())
        batch = batch.view(len(index), height, width, channels)
        if self.cutout:
            batch.masked_fill_(self._hole(index, view, height, width).unsqueeze(3), GREY)
        return batch.permute(0, 3, 1, 2)

    def _hole(self, index: Tensor, view: Tensor, height: int, width: int) -> Tensor:
        """Which pixels of each view are cut out: (B, H, W), bool."""
        centre = counter_random(index, view, self.seed ^ 0x5BD1E995) % (height * width)
        first_row = centre.div(width, rounding_mode="floor") - self.cutout // 2
        first_column = centre % width - self.cutout // 2
        row = torch.arange(height, device=index.device) - first_row[:, None]
        column = torch.arange(width, device=index.device) - first_column[:, None]
        in_row = (row >= 0) & (row < self.cutout) & (view != PLAIN)[:, None]
        in_column = (column >= 0) & (column < self.cutout)
        return in_row[:, :, None] & in_column[:, None, :]


def _reflect(position: Tensor, size: int) -> Tensor:
    """Fold positions outside [0, size) back in, without repeating the border pixel."""
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)
