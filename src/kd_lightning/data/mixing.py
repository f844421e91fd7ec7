"""Mixtures of two training images: mixup and CutMix.

The partner of a view, and the ratio or the box, follow from the image index and the view number
like its crop, so that the teacher's output on a mixture can be cached too. Pixels are mixed in
integers: the result is the same on every device.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kd_lightning.data.views import PLAIN, check_seed, counter_random
from kd_lightning.transfer import to_device

LEVELS = 128
"""Ratios of mixup are multiples of 1/128: the largest for which products fit into 16 bits."""

_RANGE = 2**32


class Mixture(NamedTuple):
    """How the views of a batch are mixed; all tensors are on the CPU.

    Attributes:
        partner: index of the image that is mixed in (B,), int64.
        ratio: share of the own image (B,), float32, in [0, 1]; 1: not mixed.
        box: top, left, bottom, right of the rectangle that is taken from the partner, (B, 4),
            int64, or None: the images are averaged with the ratio, a multiple of 1 / `LEVELS`.
    """

    partner: Tensor
    ratio: Tensor
    box: Tensor | None = None


class Mixing(Protocol):
    """Interface of classes that mix training views.

    The mixture must be a pure function of the arguments and of the object's settings.
    """

    def mixture(self, index: Tensor, view: Tensor, train: Tensor, size: tuple[int, int]) -> Mixture:
        """Choose the mixtures of a batch. The view `PLAIN` is not mixed.

        Args:
            index: image indices (B,), int64, on the CPU.
            view: view numbers (B,), int64, on the CPU.
            train: indices of the training images (N,), int64, on the CPU; partners are among them.
            size: height and width of the views, in pixels.
        """
        ...


def blend(own: Tensor, other: Tensor, mixture: Mixture) -> Tensor:
    """Mix two batches of views.

    Args:
        own: (B, C, H, W), uint8.
        other: views of the partners, of the same shape.
        mixture: how they are mixed.

    Returns:
        (B, C, H, W), uint8, in the memory format of `own`.
    """
    if mixture.box is not None:
        box = to_device(mixture.box, own.device)[:, :, None]
        row = torch.arange(own.shape[2], device=own.device)
        column = torch.arange(own.shape[3], device=own.device)
        rows = (row >= box[:, 0]) & (row < box[:, 2])
        columns = (column >= box[:, 1]) & (column < box[:, 3])
        return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], other, own)
    weight = (mixture.ratio * LEVELS).to(torch.int16)
    mixed = own.to(torch.int16).sub_(other).mul_(to_device(weight, own.device)[:, None, None, None])
    # Rounds to nearest: the shift is arithmetic.
    return mixed.add_(LEVELS // 2).bitwise_right_shift_(7).add_(other).to(torch.uint8)


@dataclass(frozen=True)
class _Mixing:
    """Common settings: how often, with which ratios, and the choice of partners."""

    alpha: float = 1.0
    probability: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be a number above 0, not {self.alpha}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], not {self.probability}")
        check_seed("seed", self.seed)

    def _draw(self, index: Tensor, view: Tensor, stream: int) -> Tensor:
        """Random 32-bit integers (B,), int64; streams 0 to 3 are independent of each other."""
        stream_seed = (self.seed ^ 0xA511E9B3 ^ (stream * 0x63D83595)) % _RANGE
        return counter_random(index, view, stream_seed)

    def _partner(self, index: Tensor, view: Tensor, train: Tensor) -> Tensor:
        return train[self._draw(index, view, 0) % len(train)]

    def _kept(self, index: Tensor, view: Tensor) -> Tensor:
        """Share of the own image in multiples of 1 / `LEVELS`, (B,), int64."""
        kept = torch.searchsorted(
            _beta_thresholds(self.alpha), self._draw(index, view, 1), right=True
        )
        mixed = self._draw(index, view, 2) < self.probability * _RANGE
        return torch.where(mixed & (view != PLAIN), kept, LEVELS)


@dataclass(frozen=True)
class Mixup(_Mixing):
    """Weighted average of two images: Zhang et al. (2018), "mixup: Beyond Empirical Risk
    Minimization", section 2.

    Args:
        alpha: the ratio is distributed as Beta(alpha, alpha); 1: uniformly, small: near 0 and 1.
        probability: share of the views that are mixed.
        seed: seed of partners and ratios, 0 to 2^32 - 1.
    """

    def mixture(self, index: Tensor, view: Tensor, train: Tensor, size: tuple[int, int]) -> Mixture:
        """See `Mixing.mixture`."""
        ratio = self._kept(index, view).float() / LEVELS
        return Mixture(self._partner(index, view, train), ratio)


@dataclass(frozen=True)
class CutMix(_Mixing):
    """A rectangle of one image pasted into another: Yun et al. (2019), "CutMix: Regularization
    Strategy to Train Strong Classifiers with Localizable Features", section 3.1.

    The rectangle has the aspect ratio of the image and a uniformly distributed centre, so that a
    part of it may lie outside; the ratio is the actual share of the own pixels.

    Args:
        alpha: the ratio before clipping is distributed as Beta(alpha, alpha).
        probability: share of the views that are mixed.
        seed: seed of partners and rectangles, 0 to 2^32 - 1.
    """

    def mixture(self, index: Tensor, view: Tensor, train: Tensor, size: tuple[int, int]) -> Mixture:
        """See `Mixing.mixture`."""
        height, width = size
        side = (1 - self._kept(index, view).double() / LEVELS).sqrt()
        position = self._draw(index, view, 3) % (height * width)
        sides = [(side * length).long() for length in size]
        centres = [position.div(width, rounding_mode="floor"), position % width]
        edges = []
        for centre, length, whole in zip(centres, sides, size, strict=True):
            first = centre - length.div(2, rounding_mode="floor")
            edges.append((first.clamp(0, whole), (first + length).clamp(0, whole)))
        (top, bottom), (left, right) = edges
        ratio = 1 - ((bottom - top) * (right - left)).float() / (height * width)
        box = torch.stack([top, left, bottom, right], dim=1)
        return Mixture(self._partner(index, view, train), ratio, box)


@functools.lru_cache(maxsize=8)
def _beta_thresholds(alpha: float) -> Tensor:
    """32-bit integers (`LEVELS`,), int64: a uniform number below the k-th is rounded to k or less.

    Inverts the cumulative distribution of Beta(alpha, alpha), rounded to multiples of 1 / `LEVELS`.
    """
    from scipy.special import betainc

    middle = (torch.arange(LEVELS).double() + 0.5) / LEVELS
    return (torch.from_numpy(betainc(alpha, alpha, middle.numpy())) * _RANGE).round().long()
