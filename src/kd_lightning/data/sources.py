"""Where the pixels of a data set come from: memory, or a source that delivers them by batches."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kd_lightning.errors import InputError


class Fetched(NamedTuple):
    """The pixels of a batch of images.

    Attributes:
        images: (M, H, W, 3), uint8, on the training device.
        rows: position of each image of the batch in `images` (B,), int64, on the CPU; None: its
            index.
    """

    images: Tensor
    rows: Tensor | None = None


class PixelSource(Protocol):
    """Interface of pixel sources.

    Attributes:
        batch_limit: number of images that `fetch`, which takes time, should be called for at once,
            in a background thread; None: `fetch` takes no time.
    """

    batch_limit: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that `fetch` delivers to."""
        ...

    def to(self, device: torch.device) -> "PixelSource":
        """The same source, delivering to another device."""
        ...

    def fetch(self, index: Tensor) -> Fetched:
        """The pixels of images (B,), int64, on the CPU. May be called by several threads.

        Raises:
            InputError: an image is damaged, or has changed since the start.
        """
        ...

    def contents(self) -> Iterator[Any]:
        """Buffers that identify all pixels, for a hash."""
        ...


class InMemoryImages:
    """All images as one tensor on the training device.

    Args:
        pixels: (N, H, W, 3), uint8.
    """

    batch_limit: int | None = None

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)."""
        return tuple(self.pixels.shape)

    @property
    def device(self) -> torch.device:
        """The device of the tensor."""
        return self.pixels.device

    def to(self, device: torch.device) -> "InMemoryImages":
        """Copy all images to a device; no copy if they are there.

        Raises:
            InputError: they do not fit there.
        """
        if self.pixels.device == device:
            return self
        try:
            return InMemoryImages(self.pixels.to(device))
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the images need {self.pixels.numel() / 1e9:.3g} GB on {device}, which has too "
                "little memory: set data.streamed=true, or use a device with more"
            ) from error

    def fetch(self, index: Tensor) -> Fetched:
        """All images, without a copy."""
        return Fetched(self.pixels)

    def contents(self) -> Iterator[Any]:
        """The pixels."""
        yield self.pixels.cpu().numpy().data
