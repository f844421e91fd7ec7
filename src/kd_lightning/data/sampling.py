"""Which views a batch is made of."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from kd_lightning.data.views import PLAIN


class ViewSampler(Sampler[dict[str, Tensor]]):
    """Yields whole batches of views: ``{"index": (B,), "view": (B,)}``, int64.

    Training visits every image once an epoch, in an order that depends on the seed and the epoch
    alone, and shows epoch e the images' view number e. Evaluation visits the images as they are,
    in order.

    Lightning calls `set_epoch` at the start of every epoch.

    Args:
        images: indices of the images of this split (N,), int64.
        batch_size: images in a batch.
        shuffle: training (True) or evaluation.
        seed: of the order.
    """

    def __init__(self, images: Tensor, batch_size: int, shuffle: bool, seed: int = 0) -> None:
        self.images = images
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose views and order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The batches of the current epoch."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = self.images[torch.randperm(len(self.images), generator=generator)]
        else:
            order = self.images
        view = self.epoch if self.shuffle else PLAIN
        for number in range(len(self)):
            index = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield {"index": index, "view": torch.full_like(index, view)}
