"""A memory bank: the latest embeddings of all training images, as negatives for CRD."""

import torch
from torch import Tensor, nn

from kd_lightning.losses.vectors import unit


class MemoryBank(nn.Module):
    """Embeddings of every image by student and teacher, and the choice of negatives among them.

    All of its state is saved with the checkpoints. It changes in training mode only.

    Args:
        images: M, number of images.
        size: length of an embedding.
        momentum: share of the previous embedding in an update, in [0, 1).

    Attributes:
        student, teacher: embeddings (M, D), float32, of length 1; at first random.
        labels: (M,), int64; -1: not seen yet.
        log_scale: logarithms of the constants Z of the scores of student and teacher, (2,).
        complete: whether an image has been seen twice, so that a first epoch is over; scalar, bool.
            Part of the extra state, which earlier checkpoints have, too.
        seed: of the choice of negatives. Like `steps` not on the device, where the host would have
            to wait for it.
        steps: number of updates.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    log_scale: Tensor
    complete: Tensor

    def __init__(self, images: int, size: int, momentum: float = 0.5) -> None:
        super().__init__()
        self.momentum = momentum
        for name in ("student", "teacher"):
            self.register_buffer(name, unit(torch.randn(images, size)))
        self.register_buffer("labels", torch.full((images,), -1))
        self.register_buffer("log_scale", torch.zeros(2))
        self.register_buffer("complete", torch.tensor(False), persistent=False)
        self.steps = 0
        self.seed = int(torch.randint(2**31, ()))

    def get_extra_state(self) -> Tensor:
        """For the state dict: seed, steps, and whether the first epoch is over, (3,), int64."""
        return torch.tensor([self.seed, self.steps, int(self.complete)])

    def set_extra_state(self, state: Tensor) -> None:
        """From the state dict; of earlier versions without the last value, which the next batch
        shows again.
        """
        self.seed, self.steps, *complete = state.tolist()
        self.complete.fill_(any(complete))

    def draw(self, index: Tensor, labels: Tensor, count: int) -> Tensor:
        """Draw negatives for images: of other classes, each with the same probability.

        A function of the seed, the number of updates and the images, whatever their order in the
        batch, so that it does not depend on interruptions and on the number of processes. Images
        that have not been seen, whose embeddings are random, only make up for missing others in the
        first epoch. Later there may be fewer than `count`: some images, such as those for
        validation, are never seen.

        Args:
            index: image indices (B,).
            labels: (B,).
            count: expected number of negatives per image.

        Returns:
            (B, M), bool: which images are drawn for each.
        """
        device = self.labels.device
        generator = torch.Generator(device).manual_seed(self.seed + self.steps)
        random = torch.rand(len(index), len(self.labels), generator=generator, device=device)
        random = random[index.argsort().argsort()]
        other = self.labels != labels[:, None]
        other[torch.arange(len(index), device=device), index] = False
        seen = other & (self.labels >= 0)
        new = other & (self.labels < 0) & ~self._complete_with(index)
        seen_count, new_count = (part.sum(dim=1, keepdim=True) for part in (seen, new))
        missing = count - seen_count
        return (seen & (random * seen_count < count)) | (new & (random * new_count < missing))

    def _complete_with(self, index: Tensor) -> Tensor:
        """`complete` once these images have been seen."""
        return self.complete | (self.labels[index] >= 0).any()

    def scale(self, fresh: Tensor) -> Tensor:
        """The constants log Z (2,), which those of the first batch, `fresh`, remain."""
        return self.log_scale if self.steps else fresh

    @torch.no_grad()
    def update(
        self, index: Tensor, labels: Tensor, student: Tensor, teacher: Tensor, log_scale: Tensor
    ) -> None:
        """Store the embeddings of a batch, in training mode.

        Args:
            index: image indices (B,).
            labels: (B,).
            student: embeddings (B, D).
            teacher: embeddings (B, D).
            log_scale: the constants (2,).
        """
        if not self.training:
            return
        # Not in place: the backward pass still needs the previous embeddings.
        for name, rows in (("student", student), ("teacher", teacher)):
            bank = getattr(self, name)
            mixed = unit(torch.lerp(rows.to(bank.dtype), bank[index], self.momentum))
            setattr(self, name, bank.index_copy(0, index, mixed))
        self.complete = self._complete_with(index)
        self.labels = self.labels.index_copy(0, index, labels)
        self.log_scale = log_scale
        self.steps = self.steps + 1
