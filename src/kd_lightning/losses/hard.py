"""Hard-label distillation: Touvron et al. (2021), "Training data-efficient image transformers &
distillation through attention" (DeiT), section 4, equation 3.
"""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.logit_term import LogitTerm
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.term import TermBatch
from kd_lightning.models.features import Output


def hard_label_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the class that the teacher predicts, a scalar of at least float32.

    Averaged over the batch. Of several largest logits of the teacher, the first counts.

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
    """
    return F.cross_entropy(at_least_float32(student), teacher.argmax(dim=1))


class HardLabel(LogitTerm):
    """Cross-entropy with the class that the teacher predicts for the view, mixed or not.

    The authors train a second head, the distillation token, with this loss. Here it applies to the
    student's only head, as in their comparison without the token (table 3, "hard distillation").
    """

    accepts_top_k = True

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """Hard-label loss of student and teacher logits (B, C); a scalar."""
        return hard_label_loss(student.logits, remembered)
