"""Random geometric and colour operations on whole batches: strong augmentation.

All arithmetic is in integers, so that a view is the same on every device. The operation of each
image is known on the CPU: it is applied to a part of the batch without waiting for the device.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_lightning.data.views import (
    GREY,
    PLAIN,
    Augmentation,
    Views,
    check_seed,
    counter_random,
    erase,
)
from kd_lightning.transfer import to_device

BITS = 10
"""Fractional bits of factors of colour operations."""

FINE = 14
"""Fractional bits of the matrices of geometric operations."""

LEVELS = 31
"""Strengths of an operation, from none to the largest, as in RandAugment."""

_LUMA = (19589, 38470, 7471)  # 0.2989, 0.587, 0.114 in units of 2^-16, as in torchvision


Operation = Callable[[Tensor, Tensor], Tensor]
"""Images (B, H, W, 3), uint8, and signed strengths in steps (B,), int64, from 1 - `LEVELS` to
`LEVELS` - 1, on the same device, to images."""


def brightness(images: Tensor, strength: Tensor) -> Tensor:
    """Multiply by 1 + 0.9 s, for a strength s in [-1, 1]."""
    return _towards(images, torch.zeros_like(images), strength)


def contrast(images: Tensor, strength: Tensor) -> Tensor:
    """Scale the distance from the mean grey value of the image by 1 + 0.9 s."""
    grey = _grey(images).flatten(1)
    mean = grey.sum(dim=1).div(grey.shape[1], rounding_mode="floor")
    return _towards(images, mean[:, None, None, None], strength)


def saturation(images: Tensor, strength: Tensor) -> Tensor:
    """Scale the distance from the grey image by 1 + 0.9 s."""
    return _towards(images, _grey(images).unsqueeze(3), strength)


def posterize(images: Tensor, strength: Tensor) -> Tensor:
    """Keep the upper 8 to 4 bits of each value."""
    dropped = (4 * strength.abs() + (LEVELS - 1) // 2).div(LEVELS - 1, rounding_mode="floor")
    kept = torch.full_like(dropped, 255).bitwise_left_shift(dropped).bitwise_and(255)
    return images & kept.to(torch.uint8)[:, None, None, None]


def solarize(images: Tensor, strength: Tensor) -> Tensor:
    """Invert values at and above 255 (1 - s)."""
    threshold = 255 - (255 * strength.abs()).div(LEVELS - 1, rounding_mode="floor")
    inverted = images >= threshold[:, None, None, None]
    return torch.where(inverted, 255 - images, images)


def autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    """Stretch each channel to the whole range; a constant channel is kept."""
    flat = images.flatten(1, 2)
    low, high = flat.amin(dim=1).long(), flat.amax(dim=1).long()
    value = torch.arange(256, device=images.device)
    spread = (high - low).clamp(min=1).unsqueeze(2)
    table = ((value - low.unsqueeze(2)) * 255).div(spread, rounding_mode="floor").clamp(0, 255)
    return _look_up(images, torch.where((high > low).unsqueeze(2), table, value))


def equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Equalise the histogram of each channel."""
    count, height, width, channels = images.shape
    values = images.flatten(1, 2).transpose(1, 2).long()
    histogram = torch.zeros(count, channels, 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    top = values.amax(dim=2, keepdim=True)
    # Pixels per step, without those of the largest value, as in Pillow and torchvision.
    step = (height * width - histogram.gather(2, top)).div(255, rounding_mode="floor")
    below = histogram.cumsum(dim=2) - histogram
    half = step.div(2, rounding_mode="floor")
    table = (below + half).div(step.clamp(min=1), rounding_mode="floor").clamp(0, 255)
    return _look_up(images, torch.where(step > 0, table, torch.arange(256, device=images.device)))


def translate_x(images: Tensor, strength: Tensor) -> Tensor:
    """Shift to the right by up to 45 % of the width, in whole pixels."""
    return _warp(images, _matrices("identity", strength), _shift(images.shape[2], strength), None)


def translate_y(images: Tensor, strength: Tensor) -> Tensor:
    """Shift down by up to 45 % of the height, in whole pixels."""
    return _warp(images, _matrices("identity", strength), None, _shift(images.shape[1], strength))


def shear_x(images: Tensor, strength: Tensor) -> Tensor:
    """Shear horizontally by up to 0.3 about the centre."""
    return _warp(images, _matrices("shear_x", strength), None, None)


def shear_y(images: Tensor, strength: Tensor) -> Tensor:
    """Shear vertically by up to 0.3 about the centre."""
    return _warp(images, _matrices("shear_y", strength), None, None)


def rotate(images: Tensor, strength: Tensor) -> Tensor:
    """Rotate by up to 30 degrees about the centre."""
    return _warp(images, _matrices("rotate", strength), None, None)


OPERATIONS: dict[str, Operation] = {
    operation.__name__: operation
    for operation in (
        translate_x, translate_y, shear_x, shear_y, rotate,
        brightness, contrast, saturation, posterize, solarize, equalize, autocontrast,
    )
}  # fmt: skip


@dataclass(frozen=True)
class RandomOperations:
    """A few random operations on every view: TrivialAugment (Müller & Hutter 2021) with one
    operation, RandAugment (Cubuk et al. 2020) without a fixed strength with several.

    Each operation is uniformly chosen, its strength uniformly distributed up to the largest.

    Args:
        of: renders the views that the operations are applied to; None: crops and flips.
        number: operations per view, one after the other.
        strength: largest strength in (0, 1]; 1: as RandAugment, e.g. rotations of 30 degrees.
        probability: probability of each operation.
        operations: names to choose from; None: all of `OPERATIONS`.
        cutout: side of a random grey square after the operations, in pixels; 0: none.
        seed: seed of the choices, 0 to 2^32 - 1.
    """

    of: Views | None = None
    number: int = 1
    strength: float = 1.0
    probability: float = 1.0
    operations: Sequence[str] | None = None
    cutout: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cutout < 0:
            raise ValueError(f"cutout must be 0 or more pixels, not {self.cutout}")
        if self.number < 1:
            raise ValueError(f"number must be at least 1, not {self.number}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {self.strength}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], not {self.probability}")
        for name in self.operations or ():
            if name not in OPERATIONS:
                raise ValueError(f"operations must be among {', '.join(OPERATIONS)}, not {name}")
        if self.operations is not None and not self.operations:
            raise ValueError("operations must name at least one operation")
        check_seed("seed", self.seed)

    def parameters(self, index: Tensor, view: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The nth operation of each view, -1 for none, and its strength from 1 - `LEVELS` to
        `LEVELS` - 1, both (B,), int64.
        """
        bits = counter_random(
            index, view, (self.seed ^ 0x1B873593) + 0x85EBCA77 * number & 0xFFFFFFFF
        )
        names = self.operations or tuple(OPERATIONS)
        largest = max(1, round(self.strength * (LEVELS - 1)))
        chosen = (bits >> 1) % len(names)
        step = (bits >> 1).div(len(names), rounding_mode="floor") % (largest + 1)
        strength = torch.where(bits & 1 == 1, step, -step)
        again = counter_random(
            index, view, (self.seed ^ 0x2545F491) + 0x9E3779B1 * number & 0xFFFFFFFF
        )
        applied = (again < self.probability * 2**32) & (view != PLAIN)
        return torch.where(applied, chosen, -1), strength

    def render(
        self,
        images: Tensor,
        index: Tensor,
        view: Tensor,
        rows: Tensor | None = None,
        size: int | None = None,
    ) -> Tensor:
        """Render a batch of views; see `Views.render`."""
        given: dict[str, Any] = {"rows": rows, "size": size}
        given = {name: value for name, value in given.items() if value is not None}
        rendered = (self.of or Augmentation()).render(images, index, view, **given)
        rendered = rendered.permute(0, 2, 3, 1)
        for number in range(self.number):
            chosen, strength = self.parameters(index, view, number)
            for position, name in enumerate(self.operations or OPERATIONS):
                where = (chosen == position).nonzero().flatten()
                if len(where):
                    there = to_device(where, images.device)
                    part = OPERATIONS[name](
                        rendered.index_select(0, there), to_device(strength[where], images.device)
                    )
                    rendered.index_copy_(0, there, part)
        if self.cutout:
            where, which = (to_device(part, images.device) for part in (index, view))
            erase(rendered, where, which, self.cutout, self.seed)
        return rendered.permute(0, 3, 1, 2)


def _grey(images: Tensor) -> Tensor:
    """Grey values (B, H, W), int32, of images (B, H, W, 3) (ITU-R BT.601)."""
    red, green, blue = images.to(torch.int32).unbind(dim=3)
    total = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]
    return total.bitwise_right_shift(16)


def _towards(images: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """Images + 0.9 s (images - other), clipped to 0 to 255."""
    amount = (strength * round(0.9 * 2**BITS)).div(LEVELS - 1, rounding_mode="trunc")
    values, other = images.to(torch.int32), other.to(torch.int32)
    change = (values - other).mul_(amount.to(torch.int32)[:, None, None, None])
    moved = change.bitwise_right_shift_(BITS).add_(values)
    return moved.clamp_(0, 255).to(torch.uint8)


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """Replace the values of each image and channel by those of a table (B, 3, 256)."""
    flat = images.flatten(1, 2).transpose(1, 2).long()
    found = table.gather(2, flat).to(torch.uint8)
    return found.transpose(1, 2).reshape(images.shape)


def _shift(length: int, strength: Tensor) -> Tensor:
    """Pixels of a translation (B,), int64: up to 150/331 of the length, as in RandAugment."""
    return (strength * length * 150).div(331 * (LEVELS - 1), rounding_mode="trunc")


@functools.lru_cache(maxsize=16)
def _table(kind: str, device: torch.device) -> Tensor:
    """Inverse matrices by strength (2 * `LEVELS` - 1, 4), int64, in units of 2^-`FINE`."""
    rows = []
    for step in range(1 - LEVELS, LEVELS):
        part = step / (LEVELS - 1)
        if kind == "rotate":
            cosine, sine = (f(math.radians(30 * part)) for f in (math.cos, math.sin))
            row = (cosine, sine, -sine, cosine)
        else:
            shears = {"identity": (0.0, 0.0), "shear_x": (0.3, 0.0), "shear_y": (0.0, 0.3)}[kind]
            row = (1.0, shears[0] * part, shears[1] * part, 1.0)
        rows.append([round(value * 2**FINE) for value in row])
    return torch.tensor(rows).to(device)


def _matrices(kind: str, strength: Tensor) -> Tensor:
    return _table(kind, strength.device)[strength + LEVELS - 1]


def _warp(images: Tensor, inverse: Tensor, right: Tensor | None, down: Tensor | None) -> Tensor:
    """Apply affine maps about the centre, to the nearest pixel; outside of the image is grey.

    Args:
        images: (B, H, W, 3), uint8.
        inverse: matrices of the inverse maps (B, 4), int64, in units of 2^-`FINE`.
        right: pixels that the result is shifted by (B,), int64, or None.
        down: the same, vertically.
    """
    count, height, width, channels = images.shape
    # Twice the distance from the centre, so that it is whole for even sizes too.
    x = (2 * torch.arange(width, device=images.device) + 1 - width).repeat(count, 1)
    y = (2 * torch.arange(height, device=images.device) + 1 - height).repeat(count, 1)
    if right is not None:
        x = x - 2 * right[:, None]
    if down is not None:
        y = y - 2 * down[:, None]
    xx, xy, yx, yy = (part[:, None] for part in inverse.to(torch.int32).unbind(dim=1))
    x, y = x.to(torch.int32), y.to(torch.int32)
    columns = (xx * x)[:, None, :] + (xy * y)[:, :, None] + (width << FINE)
    rows = (yx * x)[:, None, :] + (yy * y)[:, :, None] + (height << FINE)
    columns, rows = (part.bitwise_right_shift_(FINE + 1) for part in (columns, rows))
    outside = (columns < 0) | (columns >= width) | (rows < 0) | (rows >= height)
    first = torch.arange(count, device=images.device, dtype=torch.int32) * (height * width)
    pixels = first[:, None, None] + rows.mul_(width).add_(columns)
    pixels.masked_fill_(outside, 0)
    found = images.reshape(-1, channels).index_select(0, pixels.flatten()).view(images.shape)
    return found.masked_fill_(outside.unsqueeze(3), GREY)
