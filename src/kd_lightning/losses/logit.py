"""Logit distillation: Hinton, Vinyals & Dean (2015), "Distilling the Knowledge in a Neural
Network", section 2.
"""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.arguments import positive
from kd_lightning.losses.logit_term import LogitTerm
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.standardize import standardize as standardized
from kd_lightning.losses.term import TermBatch
from kd_lightning.models.features import Output


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), a scalar of at least float32.

    Summed over classes, averaged over the batch. The factor T^2 keeps the gradient magnitude, and
    so the meaning of the term's weight, independent of the temperature.

    Published implementations differ by constant factors: some also average over classes (DeiT,
    Tf-KD), some leave out T^2, and some compute the cross-entropy, which has the same gradient.

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        temperature: T, positive.
    """
    divergence = F.kl_div(
        F.log_softmax(at_least_float32(student) / temperature, dim=1),
        F.log_softmax(at_least_float32(teacher) / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


class Logit(LogitTerm):
    """KL divergence of the student's softened class probabilities from the teacher's.

    Args:
        temperature: softens both distributions; finite and above 0.
        standardize: standardize both logits first; see `standardize`. The authors use T = 2 and a
            weight of 9.
    """

    def __init__(self, temperature: float = 4.0, standardize: bool = False) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)
        self.standardize = standardize
        self.accepts_top_k = not standardize  # mean and variance need all logits

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """Soft-target loss of student and teacher logits (B, C); a scalar."""
        logits = student.logits, remembered
        if self.standardize:
            logits = standardized(logits[0]), standardized(logits[1])
        return soft_target_loss(*logits, self.temperature)
