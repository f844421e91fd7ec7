"""Which views a batch is made of, and the loader that renders them."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Sampler

from kd_lightning.data.views import PLAIN

Batch = dict[str, Tensor]

AHEAD = 8
"""Batches whose views are cut in one go: beside the convolutions of a small student, starting many
small operations for every batch costs more than the cutting itself."""


class ViewSampler(Sampler[Batch]):
    """Yields whole batches of views: ``{"index": (B,), "view": (B,)}``, int64, and their
    ``share`` (), float32.

    Training visits every image once an epoch, in an order that depends on the seed and the epoch
    alone, and shows epoch e the images' view number e, or e modulo the number of views. Evaluation
    visits the images as they are, in order.

    Lightning calls `set_epoch` at the start of every epoch.

    Args:
        images: indices of the images of this split (N,), int64.
        batch_size: images in a batch.
        shuffle: training (True) or evaluation.
        seed: of the order.
        views: how many views of an image there are; None: a new one every epoch.
        rank: of this process among those that train together; each yields its part of every batch.
        world: how many processes there are. Their parts may differ by an image: ``share`` is the
            weight of this part's mean in the mean over the processes, 1 where parts are equal. A
            part without an image has an image in it all the same, and a share of 0.
        smallest: images that a batch needs. A last batch of fewer joins the one before it.
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        views: int | None = None,
        rank: int = 0,
        world: int = 1,
        smallest: int = 1,
    ) -> None:
        self.rank, self.world = rank, world
        self.smallest = smallest
        self.images = images
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.views = views
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose views and order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest >= self.smallest)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current epoch."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = self.images[torch.randperm(len(self.images), generator=generator)]
        else:
            order = self.images
        view = PLAIN
        if self.shuffle:
            view = self.epoch % self.views if self.views else self.epoch
        ends = [self.batch_size * (number + 1) for number in range(len(self) - 1)]
        for together in order.tensor_split(ends):
            index = together[self.rank :: self.world]
            batch = {"share": torch.tensor(len(index) * self.world / len(together))}
            if not len(index):  # every process takes part in every step
                index = together[:1]
            yield {"index": index, "view": torch.full_like(index, view), **batch}


class ViewLoader:
    """Yields batches that are ready for a model: a sampler's views with pixels and labels.

    Lightning takes any iterable; `sampler` is where it looks for `set_epoch`, `batch_sampler` where
    it looks next.

    Args:
        sampler: yields the batches' indices and view numbers.
        cut: from indices (B,) and view numbers (B,) to uint8 views (B, 3, H, W), on the device
            where they are wanted.
        finish: makes a batch of indices, view numbers and uint8 views complete.
    """

    def __init__(
        self,
        sampler: ViewSampler,
        cut: Callable[[Tensor, Tensor], Tensor],
        finish: Callable[[Tensor, Tensor, Tensor], Batch],
    ) -> None:
        self.sampler = sampler
        self.batch_sampler = None
        self.cut = cut
        self.finish = finish
        self._given = 0  # batches of the sampler's epoch
        self._resume: dict[str, int] = {}

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were given: Lightning saves it."""
        return {"epoch": self.sampler.epoch, "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Should this very epoch be iterated next, begin it after those batches."""
        self._resume = state

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the sampler's current epoch."""
        resume, self._resume = self._resume, {}
        self._given = resume["batches"] if resume.get("epoch") == self.sampler.epoch else 0
        batches = islice(self.sampler, self._given, None)
        while ahead := list(islice(batches, AHEAD)):
            index, view = (torch.cat([batch[key] for batch in ahead]) for key in ("index", "view"))
            sizes = [len(batch["index"]) for batch in ahead]
            parts = [part.split(sizes) for part in (index, view, self.cut(index, view))]
            for batch, *pixels in zip(ahead, *parts, strict=True):
                self._given += 1
                yield {**self.finish(*pixels), "share": batch["share"]}
