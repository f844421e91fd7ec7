"""Multi-level logit distillation: Jin, Wang & Lin (2023), "Multi-level Logit Distillation",
section 3.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kd_lightning.losses.arguments import not_negative, positive
from kd_lightning.losses.logit import soft_target_loss
from kd_lightning.losses.logit_term import LogitTerm
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.term import TermBatch
from kd_lightning.models.features import Output


def class_relation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """||P_t^T P_t - P_s^T P_s||_F^2 / C, with softened probabilities P (B, C); a scalar.

    The C x C products are sums over the images: the loss grows with the square of the batch size.

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        temperature: positive.
    """
    return _difference_of_products(student, teacher, temperature, columns=True)


def batch_relation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """||P_t P_t^T - P_s P_s^T||_F^2 / B, with softened probabilities P (B, C); a scalar.

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        temperature: positive.
    """
    return _difference_of_products(student, teacher, temperature, columns=False)


def _difference_of_products(
    student: Tensor, teacher: Tensor, temperature: float, columns: bool
) -> Tensor:
    # Autocast would compute the products in half precision, and the differences are small.
    with torch.autocast(student.device.type, enabled=False):
        given, wanted = (
            (at_least_float32(logits) / temperature).softmax(dim=1) for logits in (student, teacher)
        )
        if columns:
            given, wanted = given.T, wanted.T
        return (wanted @ wanted.T - given @ given.T).square().sum() / len(given)


class MLKD(LogitTerm):
    """Matches predictions of images, relations of classes, and relations of images.

    The sum of `soft_target_loss`, `class_relation_loss` and `batch_relation_loss` over several
    temperatures. Only the first has a factor T^2, as in the authors' code.

    The authors' code differs: it takes a weakly and a strongly augmented view of each image, adds
    the first part for both and the others for the weak view; here there is one view. It multiplies
    the losses of the weak view by masks of images and classes, but after they were reduced to
    scalars, so that the masks only scale them, by 1/2; here there are none.

    Relational: both relations depend on which images share a batch.

    Args:
        temperatures: soften both distributions; finite and above 0.
        instance: weight of the predictions; at least 0.
        classes: weight of the relations of classes; at least 0.
        batch: weight of the relations of images; at least 0.
        class_images: batch size to which the relations of classes are scaled, so that their weight
            does not depend on the actual one; the authors' is 64. None: no scaling, so that their
            loss grows with the square of the batch size.
    """

    relational: ClassVar[bool] = True

    def __init__(
        self,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        instance: float = 1.0,
        classes: float = 1.0,
        batch: float = 1.0,
        class_images: int | None = None,
    ) -> None:
        super().__init__()
        if not temperatures:
            raise ValueError("temperatures must not be empty")
        self.temperatures = [positive("temperatures", value) for value in temperatures]
        self.instance = not_negative("instance", instance)
        self.classes = not_negative("classes", classes)
        self.batch = not_negative("batch", batch)
        self.class_images = class_images
        if class_images is not None:
            positive("class_images", class_images)

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """Weighted sum of all parts, for student and teacher logits (B, C); a scalar."""
        images = len(remembered)
        scale = (self.class_images or images) / images
        parts = (
            (self.instance, soft_target_loss),
            (self.classes * scale**2, class_relation_loss),
            (self.batch, batch_relation_loss),
        )
        losses = [
            weight * loss(student.logits, remembered, temperature)
            for temperature in self.temperatures
            for weight, loss in parts
        ]
        return torch.stack(losses).sum()
