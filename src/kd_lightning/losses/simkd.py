"""Distillation with the reused teacher classifier: Chen et al. (2022), "Knowledge Distillation with
the Reused Teacher Classifier", section 3.2.
"""

import torch
from torch import Tensor, nn

from kd_lightning.losses.fitnet import hint_loss
from kd_lightning.losses.map_term import MapTerm
from kd_lightning.losses.term import Context, Reads, TermBatch
from kd_lightning.models.features import LayerShapes, Output
from kd_lightning.models.reused_classifier import ReusedClassifier
from kd_lightning.models.roles import find_roles


class SimKD(MapTerm):
    """Matches the student's projected map with the teacher's last one; see `ReusedClassifier`.

    The student must be a `ReusedClassifier` (method=simkd makes it one), and the teacher's
    classifier a linear layer after a global pooling. Its weights are copied to the student at the
    first step. The mean squared difference is over all elements (equation 3); there is no other
    loss.
    """

    def __init__(self) -> None:
        super().__init__("projector", "last_stage")
        self._classifiers: tuple[nn.Linear, nn.Linear, float] | None = None

    def setup(self, context: Context) -> Reads:
        """Check that the classifier of the teacher fits the student.

        Raises:
            ValueError: it does not; the message says what to change.
        """
        student = getattr(context.student, "model", None)
        if not isinstance(student, ReusedClassifier):
            raise ValueError("the student must be a ReusedClassifier: select method=simkd")
        if not isinstance(context.teacher, LayerShapes):
            raise ValueError("the teacher's classifier is not known")
        reads = super().setup(context)
        (pair,) = self.layers.chosen
        role = find_roles(context.teacher, context.num_classes).classifier
        teacher = context.teacher.model.get_submodule(role)
        if not isinstance(teacher, nn.Linear) or teacher.in_features != pair.teacher.channels:
            raise ValueError(
                f"the teacher's classifier {role} is not a linear layer on the "
                f"{pair.teacher.channels} channels of its last feature map"
            )
        wrapper = "method.student_wrapper"
        if pair.student.channels != pair.teacher.channels:
            raise ValueError(
                f"the teacher's last map has {pair.teacher.channels} channels: set "
                f"{wrapper}.channels={pair.teacher.channels}"
            )
        if pair.student.layout.height > pair.teacher.layout.height:
            raise ValueError(
                f"the teacher's last map has a height of {pair.teacher.layout.height}: set "
                f"{wrapper}.size={pair.teacher.layout.height}"
            )
        # In a tuple, so that they are no submodules. The teacher's weights may be loaded later.
        scale = getattr(context.teacher.model, "logit_scale", 1.0)
        self._classifiers = student.classifier, teacher, float(scale)
        return reads

    def forward(self, student: Output, remembered: dict[str, Tensor], batch: TermBatch) -> Tensor:
        """Mean squared difference of the maps; a scalar."""
        self._copy_classifier()
        ((given, wanted),) = self.matched(student, remembered)
        return hint_loss(given, wanted)

    @torch.no_grad()
    def _copy_classifier(self) -> None:
        """Copy the teacher's classifier to the student, once."""
        if self._classifiers is None:
            return
        own, teacher, scale = self._classifiers
        own.weight.copy_(teacher.weight * scale)
        own.bias.zero_() if teacher.bias is None else own.bias.copy_(teacher.bias * scale)
        self._classifiers = None
