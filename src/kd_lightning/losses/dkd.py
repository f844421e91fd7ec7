"""Decoupled knowledge distillation: Zhao, Cui, Song, Qiu & Liang (2022), "Decoupled Knowledge
Distillation", section 3, equations 6 and 7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.arguments import not_negative, positive
from kd_lightning.losses.logit_term import LogitTerm
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.standardize import standardize as standardized
from kd_lightning.losses.target_class import mean_over_labels, split_target
from kd_lightning.losses.term import TermBatch
from kd_lightning.models.features import Output


def decoupled_losses(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """T^2 * (alpha * TCKD + beta * NCKD) of each image: (B,), at least float32.

    TCKD is the KL divergence of the probabilities of the target class and of the rest as a whole,
    NCKD that of the probabilities within the rest. The authors' code subtracts 1000 from the logit
    of the target class and takes the logarithm of sums of probabilities, which is infinite or
    wrong if its lead over the others is large; this is computed with logarithms throughout.

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        labels: target classes (B,), int64.
        alpha: weight of TCKD.
        beta: weight of NCKD; it is 0 for two classes.
        temperature: T, positive.
    """
    leads, within = [], []
    for logits in (student, teacher):
        target, others = split_target(at_least_float32(logits) / temperature, labels)
        # The log-odds of the target class, from which both of its log-probabilities are exact.
        leads.append(target - others.logsumexp(dim=1, keepdim=True))
        within.append(F.log_softmax(others, dim=1))
    binary = [torch.cat([F.logsigmoid(lead), F.logsigmoid(-lead)], dim=1) for lead in leads]
    tckd, nckd = (
        F.kl_div(given, wanted, reduction="none", log_target=True).sum(dim=1)
        for given, wanted in (binary, within)
    )
    return (alpha * tckd + beta * nckd) * temperature**2


class DKD(LogitTerm):
    """Decoupled distillation: the target class and the others are weighted separately.

    For mixed images, the losses with respect to both labels are averaged, weighted with their
    shares.

    Args:
        alpha: weight of the target class's part; at least 0.
        beta: weight of the other classes' part; at least 0. The authors use 2, 6 or 8 for the pairs
            of CIFAR-100.
        temperature: softens both distributions; finite and above 0.
        warmup: fraction of the training, in [0, 1], during which the loss is scaled up linearly
            from 0. The authors' 20 of 240 epochs, by default.
        standardize: standardize both logits first; see `standardize`. The authors of this use T = 2
            and multiply alpha and beta by 9.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        warmup: float = 20 / 240,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = not_negative("alpha", alpha)
        self.beta = not_negative("beta", beta)
        self.temperature = positive("temperature", temperature)
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup must be in [0, 1], not {warmup}")
        self.warmup = warmup
        self.standardize = standardize

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """Decoupled loss of student and teacher logits (B, C), times the warm-up; a scalar."""
        given, wanted = student.logits, remembered
        if self.standardize:
            given, wanted = standardized(given), standardized(wanted)
        loss = mean_over_labels(
            lambda labels: decoupled_losses(
                given, wanted, labels, self.alpha, self.beta, self.temperature
            ),
            batch,
        )
        return loss * min(1.0, batch.progress / self.warmup) if self.warmup else loss
