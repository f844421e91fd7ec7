"""DIST: Huang, You, Wang, Qian & Xu (2022), "Knowledge Distillation from A Stronger Teacher",
section 4.
"""

from typing import ClassVar

import torch
from torch import Tensor

from kd_lightning.losses.arguments import not_negative, positive
from kd_lightning.losses.logit_term import LogitTerm
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.term import TermBatch
from kd_lightning.models.features import Output

EPSILON = 1e-8  # the authors' value


def correlation(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Pearson correlation along one dimension of two matrices of equal shape.

    As in the authors' code, 1e-8 is added to the product of the norms; others (torchdistill) use it
    as a lower bound, with which the loss differs by up to 1e-4. If one of the vectors is constant
    up to rounding, the correlation is 0, and so is its gradient, which would be of the order of
    1e6.

    Args:
        first: (B, C).
        second: (B, C).
        dim: 0 for the correlations of columns (C,), 1 for those of rows (B,).
    """
    centred = [values - values.mean(dim=dim, keepdim=True) for values in (first, second)]
    norms = [values.norm(dim=dim) for values in centred]
    result = (centred[0] * centred[1]).sum(dim=dim) / (norms[0] * norms[1] + EPSILON)
    rounding = 8 * torch.finfo(result.dtype).eps
    varies = [
        norm > rounding * values.detach().norm(dim=dim)
        for norm, values in zip(norms, (first, second), strict=True)
    ]
    return torch.where(varies[0] & varies[1], result, torch.zeros_like(result))


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    beta: float,
    gamma: float,
    temperature: float,
) -> Tensor:
    """T^2 * (beta * inter-class + gamma * intra-class relation), a scalar of at least float32.

    Each is 1 minus the mean correlation of softened class probabilities: of an image over the
    classes (inter), and of a class over the images of the batch (intra).

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        beta: weight of the relations of classes.
        gamma: weight of the relations of images; constant for a batch of 1.
        temperature: T, positive.
    """
    given, wanted = (
        (at_least_float32(logits) / temperature).softmax(dim=1) for logits in (student, teacher)
    )
    inter = 1 - correlation(given, wanted, dim=1).mean()
    intra = 1 - correlation(given, wanted, dim=0).mean()
    return temperature**2 * (beta * inter + gamma * intra)


class DIST(LogitTerm):
    """Matches the correlations between classes and between images, not the probabilities.

    Relational: the intra-class part depends on which images share a batch.

    Args:
        beta: weight of the relations of classes, per image; at least 0.
        gamma: weight of the relations of images, per class; at least 0.
        temperature: softens both distributions; finite and above 0. The authors use 4 for CIFAR-100
            and 1 for ImageNet.
    """

    relational: ClassVar[bool] = True

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.beta = not_negative("beta", beta)
        self.gamma = not_negative("gamma", gamma)
        self.temperature = positive("temperature", temperature)

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """DIST loss of student and teacher logits (B, C); a scalar."""
        return dist_loss(student.logits, remembered, self.beta, self.gamma, self.temperature)
