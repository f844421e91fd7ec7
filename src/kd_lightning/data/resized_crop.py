"""Random resized crops."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_lightning.data.views import PLAIN, check_seed, counter_random
from kd_lightning.transfer import to_device

_BITS = 8  # fractional bits of positions


@dataclass(frozen=True)
class ResizedCrop:
    """A random part of the image, resized to the whole, and horizontal flips: Szegedy et al.
    (2015), "Going Deeper with Convolutions", section 6.

    Interpolation is bilinear, in integers.

    Args:
        scale: smallest and largest share of the area.
        ratio: smallest and largest ratio of width to height, relative to that of the image; its
            logarithm is uniform. A part that is longer than the image is shortened.
        flip: whether half of the views are flipped horizontally.
        seed: seed of the views, 0 to 2^32 - 1.
    """

    scale: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two ascending numbers in (0, 1], not {self.scale}")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio must be two ascending numbers above 0, not {self.ratio}")
        check_seed("seed", self.seed)

    def boxes(
        self, index: Tensor, view: Tensor, size: tuple[int, int], plain: int | None = None
    ) -> Tensor:
        """Top, left, height and width of each part, (B, 4), int64; the whole image for `PLAIN`.

        Args:
            index: image indices (B,), int64.
            view: view numbers (B,), int64.
            size: height and width of the images, in pixels.
            plain: height and width of the part for `PLAIN`, the centre; None: the whole image.
        """
        area, shape, place = (
            counter_random(index, view, self.seed ^ stream)
            for stream in (0x3C6EF372, 0x7F4A7C15, 0x510E527F)
        )
        share = self.scale[0] + (self.scale[1] - self.scale[0]) * area.double() / 2**32
        low, high = map(math.log, self.ratio)
        ratio = (low + (high - low) * shape.double() / 2**32).exp()
        height = (size[0] * (share / ratio).sqrt()).round().long().clamp(1, size[0])
        width = (size[1] * (share * ratio).sqrt()).round().long().clamp(1, size[1])
        top = place.bitwise_right_shift(16) % (size[0] - height + 1)
        left = place.bitwise_and(0xFFFF) % (size[1] - width + 1)
        box = torch.stack([top, left, height, width], dim=1)
        tall, wide = size if plain is None else (plain, plain)
        whole = torch.tensor([(size[0] - tall) // 2, (size[1] - wide) // 2, tall, wide])
        return torch.where((view == PLAIN)[:, None], whole, box)

    def render(
        self,
        images: Tensor,
        index: Tensor,
        view: Tensor,
        rows: Tensor | None = None,
        size: int | None = None,
    ) -> Tensor:
        """Render a batch of views; see `Views.render`."""
        height, width, channels = images.shape[1:]
        flip = (counter_random(index, view, self.seed ^ 0x1F83D9AB) & 1 == 1) & (view != PLAIN)
        top, left, tall, wide = to_device(
            self.boxes(index, view, (height, width), size), images.device
        ).unbind(dim=1)
        shown = (height, width) if size is None else (size, size)
        row, row_weight = _positions(top, tall, shown[0])
        column, column_weight = _positions(left, wide, shown[1])
        if self.flip:
            flipped = to_device(flip, images.device)[:, None]
            column = [torch.where(flipped, part.flip(1), part) for part in column]
            column_weight = torch.where(flipped, column_weight.flip(1), column_weight)
        place = to_device(index if rows is None else rows, images.device)
        first = place[:, None] * (height * width)
        pixels = images.view(-1, channels)

        def corner(lower: int, right: int) -> Tensor:
            position = (first + row[lower] * width)[:, :, None] + column[right][:, None, :]
            found = pixels.index_select(0, position.flatten())
            return found.view(len(index), *shown, channels).to(torch.int32)

        across, down = column_weight[:, None, :, None], row_weight[:, :, None, None]
        upper, lower = (
            (one := corner(side, 0)) * 2**_BITS + (corner(side, 1) - one) * across
            for side in (0, 1)
        )
        mixed = upper * 2**_BITS + (lower - upper) * down
        mixed = (mixed + 2 ** (2 * _BITS - 1)).bitwise_right_shift(2 * _BITS)
        return mixed.to(torch.uint8).permute(0, 3, 1, 2)


def _positions(start: Tensor, length: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
    """Source positions on both sides of each target position, (B, `size`) each, int64, and the
    weight of the second in units of 2^-`_BITS`, int32.

    Args:
        start: first position of the source part (B,), int64.
        length: its length (B,), int64.
        size: number of target positions.
    """
    target = 2 * torch.arange(size, device=start.device) + 1
    # The centre of target position i is at (i + 1/2) length / size.
    exact = (target * length[:, None] * 2 ** (_BITS - 1)).div(size, rounding_mode="floor")
    last = (length[:, None] - 1) * 2**_BITS
    exact = torch.minimum((exact - 2 ** (_BITS - 1)).clamp(min=0), last)
    before = exact.bitwise_right_shift(_BITS)
    after = torch.minimum(before + 1, length[:, None] - 1)
    weight = exact.bitwise_and(2**_BITS - 1).to(torch.int32)
    return [start[:, None] + before, start[:, None] + after], weight
