"""Cross-entropy with the true labels."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.term import Term, TermBatch
from kd_lightning.models.features import Output


class CrossEntropy(Term):
    """Cross-entropy of the student's logits with the labels.

    Args:
        label_smoothing: target probability mass spread over all classes, in [0, 1).
    """

    needs_teacher: ClassVar[bool] = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, student: Output, remembered: None, batch: TermBatch) -> Tensor:
        """Cross-entropy of logits (B, C) with labels (B,); a scalar.

        For mixed images, the average over both labels, weighted with their shares (Zhang et al.
        2018, "mixup: Beyond Empirical Risk Minimization").
        """
        logits, smoothing = at_least_float32(student.logits), self.label_smoothing
        if batch.partner_labels is None or batch.ratio is None:
            return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        own, other = (
            F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
            for labels in (batch.labels, batch.partner_labels)
        )
        return torch.lerp(other, own, batch.ratio.to(own.dtype)).mean()
