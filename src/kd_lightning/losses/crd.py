"""Contrastive representation distillation: Tian, Krishnan & Isola (2020), "Contrastive
Representation Distillation".
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.arguments import positive
from kd_lightning.losses.memory_bank import MemoryBank
from kd_lightning.losses.term import Context, Reads, TermBatch
from kd_lightning.losses.vectors import VectorTerm, unit
from kd_lightning.models.features import Output
from kd_lightning.transfer import to_device

EPSILON = 1e-7
"""Added to probabilities, as in the authors' code."""


def info_nce_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Contrastive loss with the images of the batch as negatives; a scalar.

    With the scores s_i . t_j / T, the mean over images i of -log softmax_j at j = i, plus the same
    for the transposed scores: InfoNCE (van den Oord et al. 2018, "Representation Learning with
    Contrastive Predictive Coding", equation 4) in both directions. Negatives are the images of
    other classes, as in section 4.4 of Tian et al.; an image without negatives has a loss of 0.

    Args:
        student: embeddings (B, D), of length 1.
        teacher: embeddings (B, D), of length 1.
        labels: (B,).
        temperature: T, positive.
    """
    scores = student @ teacher.T / temperature
    same = labels[:, None] == labels
    same.fill_diagonal_(False)
    scores = scores.masked_fill(same, -torch.inf)
    target = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)


def noise_contrastive_loss(own: Tensor, other: Tensor, drawn: Tensor, noise: float) -> Tensor:
    """Noise-contrastive estimation with given negatives; a scalar.

    Section 3.2 and equation 19 of Tian et al., as in the authors' code: with P the normalised
    score and c = K / M, the mean over images of -log P+ / (P+ + c) - sum of log c / (P- + c), where
    1e-7 is added to both denominators. Computed from logarithms, which do not overflow at low
    temperatures.

    Args:
        own: log P of the right pairs, (B,).
        other: log P of the images of a memory bank, (B, M).
        drawn: how often each is a negative, (B, M), integers or bool.
        noise: c, the number of negatives divided by that of all images.
    """
    floor = math.log(noise + EPSILON)
    attraction = -F.logsigmoid(own - floor)
    repulsion = floor - math.log(noise) - F.logsigmoid(floor - other)
    return (attraction + (repulsion * drawn).sum(dim=1)).mean()


def log_scale(own: Tensor, other: Tensor, drawn: Tensor) -> Tensor:
    """Logarithm of Z, the mean of the exponentials of scores, times M; without a gradient.

    Args:
        own: scores of the right pairs, (B,).
        other: scores of the images of a memory bank, (B, M).
        drawn: how often each is a negative, (B, M), integers or bool.
    """
    own, other, drawn = own.detach(), other.detach(), drawn.to(other.dtype)
    total = torch.cat([own, (other + drawn.log()).flatten()]).logsumexp(dim=0)
    return total - (len(own) + drawn.sum()).log() + math.log(other.shape[1])


class CRD(VectorTerm):
    """Embeddings of one image by student and teacher attract, those of different images repel.

    Both networks' vectors are embedded by trained linear layers, and divided by their lengths.

    Without `memory` (the default) the negatives are the other images of the batch; see
    `info_nce_loss`. It needs no memory, but large batches. With `memory` they are drawn from the
    latest embeddings of all training images, as in the paper; see `noise_contrastive_loss` and
    `MemoryBank`. In deviation from the authors' code, each image of another class is drawn
    independently, so that K is the expected number of negatives; and embeddings of images that have
    not been seen are used in the first epoch only, as long as there are not enough others.

    Cost with memory: two banks of M * D floats, which are part of every checkpoint, about ten
    temporary tensors of B * M floats, and 2 B M D multiplications; suited for up to some 100,000
    images. Mixed images count as their class of the larger share.

    Args:
        student_layer, teacher_layer: see `VectorTerm`.
        size: D, length of the embeddings.
        temperature: T, divides the scores; positive.
        memory: whether negatives are drawn from a memory bank.
        negatives: K, their number with `memory`; at most that of the images.
        momentum: share of the previous embedding in an update of the bank, in [0, 1).
    """

    def __init__(
        self,
        student_layer: str = "embedding",
        teacher_layer: str = "embedding",
        size: int = 128,
        temperature: float = 0.07,
        memory: bool = False,
        negatives: int = 16384,
        momentum: float = 0.5,
    ) -> None:
        super().__init__(student_layer, teacher_layer)
        for name, value in (("size", size), ("negatives", negatives)):
            if value < 1 or value != int(value):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {momentum}")
        self.temperature = positive("temperature", temperature)
        self.size, self.memory, self.negatives, self.momentum = size, memory, negatives, momentum
        self.bank: MemoryBank | None = None

    def setup(self, context: Context) -> Reads:
        """Find the layers, and create the embeddings and the memory bank.

        Raises:
            ValueError: see `VectorTerm.setup`; or the number of training images is unknown.
        """
        reads = super().setup(context)
        self.student_embedding = nn.Linear(self.student.size, self.size)
        self.teacher_embedding = nn.Linear(self.teacher.size, self.size)
        if self.memory:
            if not context.train_size:
                raise ValueError("memory=true needs the number of training images")
            self.bank = MemoryBank(context.train_size, self.size, self.momentum)
            self.bank.train(self.training)
        return reads

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """Contrast the embeddings of the images of the batch; a scalar."""
        labels = _largest_labels(batch)
        # Autocast would compute the scores in half precision, and divides them by 0.07.
        with torch.autocast(remembered.device.type, enabled=False):
            given = unit(self.student_embedding(self.student.of(student)))
            wanted = unit(self.teacher_embedding(remembered))
            if self.bank is None:
                return info_nce_loss(given, wanted, labels, self.temperature)
            index = to_device(batch.index, labels.device)
            return self.against_bank(self.bank, given, wanted, index, labels)

    def against_bank(
        self, bank: MemoryBank, student: Tensor, teacher: Tensor, index: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss with negatives from a bank, which is updated afterwards; a scalar.

        Args:
            bank: the bank.
            student: embeddings (B, D), of length 1.
            teacher: embeddings (B, D), of length 1.
            index: image indices (B,), on the device of the embeddings.
            labels: (B,).
        """
        images = len(bank.labels)
        negatives = min(self.negatives, images)
        drawn = bank.draw(index, labels, negatives)
        # Each network's embeddings are compared with those of the other.
        scores = [
            (
                (anchor * rows[index]).sum(dim=1) / self.temperature,
                anchor @ rows.T / self.temperature,
            )
            for anchor, rows in ((student, bank.teacher), (teacher, bank.student))
        ]
        scale = bank.scale(torch.stack([log_scale(*pair, drawn) for pair in scores]))
        losses = [
            noise_contrastive_loss(own - constant, other - constant, drawn, negatives / images)
            for (own, other), constant in zip(scores, scale, strict=True)
        ]
        bank.update(index, labels, student.detach(), teacher.detach(), scale)
        return torch.stack(losses).sum()


def _largest_labels(batch: TermBatch) -> Tensor:
    """The labels (B,) with the larger share in each image."""
    if batch.partner_labels is None or batch.ratio is None:
        return batch.labels
    return torch.where(batch.ratio >= 0.5, batch.labels, batch.partner_labels)
