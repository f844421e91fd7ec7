"""The batch sampler of (image, view) pairs, and the loader that renders them."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from kd_lightning.data.views import PLAIN

Batch = dict[str, Any]
"""``shown`` (`Shown`); ``loss_weight``, a number; on the training device ``images`` (B, 3, H, W),
``labels`` (B,) and other tensors."""

AHEAD = 8
"""Number of batches rendered at once: for a small student, the overhead of launching many small
operations per batch exceeds the cost of the rendering itself."""

PREFETCHED = 2
"""Number of such groups of batches whose pixels are fetched in the background."""


class Shown:
    """Which views a batch consists of.

    No container known to Lightning or DDP, which copy all tensors of a batch to the device: the
    teacher's outputs are looked up on the host.

    Args:
        index: image indices (B,), int64, on the CPU.
        view: view numbers (B,), int64, on the CPU.
    """

    def __init__(self, index: Tensor, view: Tensor) -> None:
        self.index, self.view = index, view


class ViewSampler(Sampler[Batch]):
    """Yields batches of views: ``shown``, and ``loss_weight``.

    In training, every image appears once per epoch, in an order that depends only on the seed and
    the epoch; epoch e uses view number e, modulo the number of views. In evaluation, images are
    in the given order and not augmented.

    Lightning calls `set_epoch` at the start of every epoch.

    Args:
        images: indices of the images of this split (N,), int64.
        batch_size: images per batch, over all processes.
        shuffle: training (True) or evaluation.
        seed: seed of the order.
        views: number of views per image; None: a new one every epoch.
        rank: rank of this process; each yields its part of every batch.
        world: number of processes. Their parts may differ in size by one image: ``loss_weight`` is
            the weight of this part's mean in the mean over the processes, 1 if all parts are equal.
            An empty part is filled with one image of weight 0.
        smallest: minimum batch size; a smaller last batch is merged into the previous one.
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
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches per epoch."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return max(1, whole + (rest >= self.smallest))

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
            weight = len(index) * self.world / len(together)
            if not len(index):  # every process must take part in every step
                index = together[:1]
            yield {"shown": Shown(index, torch.full_like(index, view)), "loss_weight": weight}


class ViewLoader:
    """Yields complete batches: renders a sampler's views and adds the labels.

    Lightning accepts any iterable; it calls `set_epoch` on `sampler` or `batch_sampler`.

    Args:
        sampler: yields the batches' indices and view numbers.
        cut: renders indices (B,) and view numbers (B,) to uint8 ``images`` (B, 3, H, W), with their
            labels, on the training device.
        finish: normalises the images of a batch.
        fetch: fetches the pixels of indices and view numbers, for `cut`, in a background thread;
            None: `cut` needs no such help.
        limit: maximum number of images that are fetched at once, unless a batch is larger.
    """

    def __init__(
        self,
        sampler: ViewSampler,
        cut: Callable[..., Batch],
        finish: Callable[[Batch], Batch],
        fetch: Callable[[Tensor, Tensor], Any] | None = None,
        limit: int | None = None,
    ) -> None:
        self.sampler = sampler
        self.batch_sampler = None
        self.cut = cut
        self.finish = finish
        self.fetch = fetch
        self.ahead = AHEAD
        if limit is not None:
            self.ahead = min(AHEAD, max(1, limit * sampler.world // sampler.batch_size))
        self._given = 0  # batches yielded in the current epoch
        self._resume: dict[str, int] = {}

    def state_dict(self) -> dict[str, int]:
        """The epoch and the number of its batches yielded so far; saved by Lightning."""
        return {"epoch": self.sampler.epoch, "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip these batches if the next iteration is of the same epoch."""
        self._resume = state

    def __len__(self) -> int:
        """Number of batches per epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the sampler's current epoch."""
        resume, self._resume = self._resume, {}
        self._given = resume["batches"] if resume.get("epoch") == self.sampler.epoch else 0
        for ahead, cut in self._groups(islice(self.sampler, self._given, None)):
            sizes = [len(batch["shown"].index) for batch in ahead]
            parts = {key: value.split(sizes) for key, value in cut.items()}
            for number, batch in enumerate(ahead):
                self._given += 1
                yield self.finish({**batch, **{key: part[number] for key, part in parts.items()}})

    def _groups(self, batches: Iterator[Batch]) -> Iterator[tuple[list[Batch], Batch]]:
        """Groups of batches, and the views of each group, rendered together."""
        groups = iter(lambda: list(islice(batches, self.ahead)), [])
        if self.fetch is None:
            for group in groups:
                yield group, self.cut(*_views(group))
            return
        waiting: deque[tuple[list[Batch], Future[Any]]] = deque()
        pool = ThreadPoolExecutor(1, "prefetch")
        try:
            while True:
                for group in islice(groups, PREFETCHED + 1 - len(waiting)):
                    waiting.append((group, pool.submit(self.fetch, *_views(group))))
                if not waiting:
                    return
                group, fetched = waiting.popleft()
                yield group, self.cut(*_views(group), fetched.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _views(group: list[Batch]) -> tuple[Tensor, Tensor]:
    """Image indices and view numbers of all batches of a group."""
    shown: list[Shown] = [batch["shown"] for batch in group]
    return torch.cat([part.index for part in shown]), torch.cat([part.view for part in shown])
