"""Normalized knowledge distillation: Yang, Zeng, Li, Zhang, Yuan & Li (2023), "From Knowledge
Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized
Soft Labels", section 3.
"""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.arguments import not_negative, positive
from kd_lightning.losses.logit_term import LogitTerm
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.target_class import mean_over_labels, split_target
from kd_lightning.losses.term import TermBatch
from kd_lightning.models.features import Output


def normalized_losses(
    student: Tensor, teacher: Tensor, labels: Tensor, gamma: float, temperature: float
) -> Tensor:
    """-p_t log p_s - gamma * T^2 * sum(q_t log q_s) of each image: (B,), at least float32.

    p is the probability of the target class, without temperature, and q are the probabilities of
    the other classes at the temperature T, normalized to a sum of 1. Both parts are cross-entropies
    and are not 0 if student and teacher are equal.

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        labels: target classes (B,), int64.
        gamma: weight of the other classes.
        temperature: T, positive.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    target = labels[:, None]
    log_p = F.log_softmax(student, dim=1).gather(1, target).squeeze(1)
    p = F.softmax(teacher, dim=1).gather(1, target).squeeze(1)
    log_q = F.log_softmax(split_target(student, labels)[1] / temperature, dim=1)
    q = F.softmax(split_target(teacher, labels)[1] / temperature, dim=1)
    return -p * log_p - gamma * temperature**2 * (q * log_q).sum(dim=1)


class NKD(LogitTerm):
    """The target class with the teacher's probability as its weight, and the others normalized.

    For mixed images, the losses with respect to both labels are averaged, weighted with their
    shares; the authors use the label of the larger share.

    Args:
        gamma: weight of the other classes; at least 0.
        temperature: softens the other classes' distributions; finite and above 0.
    """

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        self.gamma = not_negative("gamma", gamma)
        self.temperature = positive("temperature", temperature)

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """Normalized loss of student and teacher logits (B, C); a scalar."""
        return mean_over_labels(
            lambda labels: normalized_losses(
                student.logits, remembered, labels, self.gamma, self.temperature
            ),
            batch,
        )
