"""Random images for `benchmark.py`; the content does not affect the time."""

from typing import Any

import torch

from kd_lightning.data.module import ImageDataModule, Images

DISTINCT = 45_000
"""Maximum number of training images; they are repeated on a fast device."""


class RandomImages(ImageDataModule):
    """Random images, the same every time."""

    def __init__(self, train: int = 50_000, test: int = 10_000, **settings: Any) -> None:
        super().__init__(**settings)
        self.sizes = train, test

    @property
    def classes(self) -> list[str]:
        """Ten."""
        return [str(number) for number in range(10)]

    def load(self) -> Images:
        """Noise."""
        train, test = self.sizes
        generator = torch.Generator().manual_seed(0)
        shape = (train + test, self.image_size, self.image_size, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return Images(pixels, torch.arange(train + test) % 10, train_size=train)


def random_batches(count: int, batch_size: int, **views: Any) -> RandomImages:
    """Training batches with the same views in every epoch, and 1,000 validation images.

    Memory does not grow with the number of batches beyond `DISTINCT` images.

    Args:
        count: batches per epoch.
        batch_size: images per batch.
        views: settings of the augmentation; see `ImageDataModule`.
    """
    shown = count * batch_size
    train = min(shown, DISTINCT) + 1000
    data = RandomImages(
        train=train, test=1000, name="random", batch_size=batch_size,
        val_fraction=1000 / train, views=1, **views,
    )  # fmt: skip
    data.setup()
    images = data.splits["train"]
    data.splits["train"] = images.repeat(-(-shown // len(images)))[:shown]
    return data
