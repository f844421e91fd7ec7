"""Cross-entropy with the true labels: the only term that needs no teacher."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

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
        """Cross-entropy of logits (B, C) with labels (B,); a scalar."""
        return F.cross_entropy(
            student.logits.float(), batch.labels, label_smoothing=self.label_smoothing
        )
