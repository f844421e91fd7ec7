"""Teacher-free distillation: Yuan, Tay, Li, Wang & Feng (2020), "Revisiting Knowledge Distillation
via Label Smoothing Regularization", section 4, "manually designed teacher" (Tf-KD_reg).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.arguments import positive
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.target_class import mean_over_labels
from kd_lightning.losses.term import Term, TermBatch
from kd_lightning.models.features import Output


def virtual_teacher_losses(
    student: Tensor, labels: Tensor, temperature: float, probability: float
) -> Tensor:
    """KL(softmax(u / T) || softmax(student)) / C of each image: (B,), at least float32.

    The virtual teacher's output u has the given probability for the label and the rest spread over
    the other classes.

    This is the authors' code. It differs from the paper: probabilities, not logits, are softened,
    so that at T = 20 the targets are nearly uniform; the student is not softened; and the loss is
    averaged over classes. As all classes but one have equal targets, the gradient is 1 / C times
    that of label smoothing, of 0.9995 for 100 classes at T = 20; the label smoothing of 0.01 that
    u itself describes is `CrossEntropy(label_smoothing=0.01 * C / (C - 1))`.

    Args:
        student: logits (B, C), with at least two classes.
        labels: (B,), int64.
        temperature: T of the virtual teacher, positive.
        probability: of the label in u, in (0, 1).
    """
    student = at_least_float32(student)
    classes = student.shape[1]
    virtual = torch.full_like(student, (1 - probability) / (classes - 1))
    virtual = virtual.scatter(1, labels[:, None], probability)
    divergence = F.kl_div(
        F.log_softmax(student, dim=1),
        F.log_softmax(virtual / temperature, dim=1),
        reduction="none",
        log_target=True,
    )
    return divergence.mean(dim=1)


class TfKD(Term):
    """Distillation from a virtual teacher, which always predicts the label: no network is needed.

    In the authors' total loss, (1 - a) * cross-entropy + a * m * this, the constants are a = 0.1
    and m = 100 for a ResNet-18 on CIFAR-100. As the loss is averaged over classes, m belongs to
    their number. For mixed images, the losses with respect to both labels are averaged, weighted
    with their shares.

    Args:
        temperature: of the virtual teacher; finite and above 0.
        probability: the virtual teacher's for the label, in (0, 1).
    """

    needs_teacher: ClassVar[bool] = False

    def __init__(self, temperature: float = 20.0, probability: float = 0.99) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)
        if not 0 < probability < 1:
            raise ValueError(f"probability must be in (0, 1), not {probability}")
        self.probability = probability

    def forward(self, student: Output, remembered: None, batch: TermBatch) -> Tensor:
        """Virtual-teacher loss of logits (B, C) with labels (B,); a scalar."""
        return mean_over_labels(
            lambda labels: virtual_teacher_losses(
                student.logits, labels, self.temperature, self.probability
            ),
            batch,
        )
