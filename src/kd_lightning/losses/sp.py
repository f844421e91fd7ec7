"""Similarity-preserving distillation: Tung & Mori (2019), "Similarity-Preserving Knowledge
Distillation".
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.scale import to_usual_scale
from kd_lightning.losses.term import Context, Reads, Term, TermBatch
from kd_lightning.losses.vectors import find_layer, unit
from kd_lightning.models.features import Output


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """||G_t - G_s||_F^2 / B^2, where the rows of G are those of F F^T divided by their length.

    Equations 1 to 4 of the paper, for one pair of layers; a scalar of at least float32.
    torchdistill divides the rows by the sum of their absolute values instead. Of an image whose
    features are all 0, the row is 0 and has no gradient; for a batch of 1 the loss is 0.

    Memory of the order of B^2, and 2 B^2 D multiplications per network.

    Args:
        student: features F (B, ...), which are flattened.
        teacher: features (B, ...), of any shape.
    """
    # Autocast would compute the products in half precision.
    with torch.autocast(student.device.type, enabled=False):
        given, wanted = (
            unit(rows @ rows.T)
            for rows in (to_usual_scale(part.flatten(1)) for part in (student, teacher))
        )
        return F.mse_loss(given, wanted)


class SP(Term):
    """Images that are similar for the teacher should be similar for the student.

    Remembers the whole feature map of the teacher, because all of its elements enter the
    similarities: a cache holds C * H * W values per view.

    Args:
        student_layer: layer of the student: its name or role (see `roles.select`). Its output is
            flattened.
        teacher_layer: layer of the teacher.
    """

    relational: ClassVar[bool] = True

    def __init__(
        self, student_layer: str = "last_stage", teacher_layer: str = "last_stage"
    ) -> None:
        super().__init__()
        self._names = student_layer, teacher_layer
        self.student_layer = self.teacher_layer = ""

    def setup(self, context: Context) -> Reads:
        """Find the layers.

        Raises:
            ValueError: a layer does not exist.
        """
        self.student_layer, self.teacher_layer = (
            find_layer(whose, shapes, name, context.num_classes)
            for whose, shapes, name in zip(
                ("student", "teacher"), (context.student, context.teacher), self._names, strict=True
            )
        )
        return Reads((self.student_layer,), (self.teacher_layer,), teacher_logits=False)

    def remember(self, teacher: Output) -> Tensor:
        """The teacher's features, flattened: (B, D)."""
        return at_least_float32(teacher.features[self.teacher_layer].flatten(1))

    def depends_on(self) -> dict[str, Any]:
        """The teacher's layer."""
        return {"features": self.teacher_layer}

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """Compare the similarities of the images of the batch; a scalar."""
        return similarity_loss(student.features[self.student_layer], remembered)
