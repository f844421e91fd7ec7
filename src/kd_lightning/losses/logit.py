"""Logit distillation: Hinton, Vinyals & Dean (2015), "Distilling the Knowledge in a Neural
Network", section 2.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.term import Term, TermBatch
from kd_lightning.models.features import Output


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), a scalar of at least float32.

    Summed over classes, averaged over the batch. The factor T^2 keeps the gradient magnitude, and
    so the meaning of the term's weight, independent of the temperature.

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


class Logit(Term):
    """KL divergence of the student's softened class probabilities from the teacher's.

    Args:
        temperature: softens both distributions; finite and above 0.
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a number above 0, not {temperature}")
        self.temperature = temperature

    def remember(self, teacher: Output) -> Tensor:
        """The teacher's logits (B, C), without temperature."""
        return teacher.logits.float()

    def depends_on(self) -> dict[str, Any]:
        """Empty: the temperature is applied in `forward`."""
        return {}

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """Soft-target loss of student and teacher logits (B, C); a scalar."""
        return soft_target_loss(student.logits, remembered, self.temperature)
