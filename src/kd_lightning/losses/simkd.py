"""Distillation with the reused teacher classifier: Chen et al. (2022), "Knowledge Distillation with
the Reused Teacher Classifier", section 3.2.
"""

import torch
from torch import Tensor, nn

from kd_lightning.losses.fitnet import hint_loss
from kd_lightning.losses.map_term import MapTerm
from kd_lightning.losses.pairs import FeatureMap
from kd_lightning.losses.term import Context, Reads, TermBatch
from kd_lightning.models.features import FeatureReader, LayerShapes, Output
from kd_lightning.models.reused_classifier import POOLING, ReusedClassifier
from kd_lightning.models.roles import Roles, find_roles
from kd_lightning.models.trial import evaluation_mode


class SimKD(MapTerm):
    """Matches the student's projected map with the teacher's last one, which it pools to its
    embedding; see `ReusedClassifier`.

    The student must be a `ReusedClassifier` (method=simkd makes it one), and the teacher's
    classifier a linear layer after a global pooling. Its weights are copied to the student when
    the training begins. The mean squared difference is over all elements (equation 3); there is
    no other loss.
    """

    def __init__(self) -> None:
        super().__init__("projector", "pooled")
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
        roles = find_roles(context.teacher, context.num_classes)
        modules = dict(context.teacher.model.named_modules(remove_duplicate=False))
        if (teacher := modules.get(roles.classifier)) is None:
            raise ValueError("the weights of the teacher's classifier are not known")
        scale = float(getattr(context.teacher.model, "logit_scale", 1.0))
        pooling = _poolings(context.teacher, pair.teacher, roles, scale)
        if not isinstance(teacher, nn.Linear) or not pooling:
            raise ValueError(
                f"the teacher's classifier {roles.classifier} cannot be reused: it is not a linear "
                "layer on the average or the maxima of its last feature map"
            )
        if (
            pair.student.channels != pair.teacher.channels
            or pair.student.layout.height > pair.teacher.layout.height
            or student.pooling not in pooling
        ):
            settings = {
                "channels": pair.teacher.channels,
                "size": pair.teacher.layout.height,
                "pooling": pooling[0],
            }
            text = " ".join(f"method.student_wrapper.{k}={v}" for k, v in settings.items())
            raise ValueError(f"for this teacher set {text}")
        # In a tuple, so that they are no submodules. The teacher's weights may be loaded later.
        self._classifiers = student.classifier, teacher, scale
        return reads

    def forward(self, student: Output, remembered: dict[str, Tensor], batch: TermBatch) -> Tensor:
        """Mean squared difference of the maps; a scalar."""
        ((given, wanted),) = self.matched(student, remembered)
        return hint_loss(given, wanted)

    @torch.no_grad()
    def begin(self) -> None:
        """Copy the teacher's classifier to the student."""
        assert self._classifiers is not None
        own, teacher, scale = self._classifiers
        own.weight.copy_(teacher.weight * scale)
        own.bias.zero_() if teacher.bias is None else own.bias.copy_(teacher.bias * scale)


def _poolings(shapes: LayerShapes, last: FeatureMap, roles: Roles, scale: float) -> list[str]:
    """How the teacher pools its last map before the classifier, tried on random images.

    Args:
        shapes: layers of the teacher.
        last: its last map.
        roles: its embedding and classifier.
        scale: factor of the classifier's output.

    Returns:
        Those of `POOLING` that give its embedding; none if the logits are not the classifier's
        output.
    """
    device = next(shapes.model.parameters()).device
    images = torch.randn(
        2, 3, shapes.image_size, shapes.image_size, generator=torch.Generator().manual_seed(0)
    )
    reader = FeatureReader(shapes.model, [last.layer, roles.embedding, roles.classifier])
    try:
        with evaluation_mode(shapes.model):
            output = reader(images.to(device), complete=True)
    finally:
        reader.close()
    if not torch.allclose(output.features[roles.classifier] * scale, output.logits):
        return []
    embedding = output.features[roles.embedding].flatten(1)
    pooled = {name: pool(last.of(output), 1).flatten(1) for name, pool in POOLING.items()}
    return [
        name
        for name, value in pooled.items()
        if value.shape == embedding.shape and torch.allclose(value, embedding, atol=1e-6)
    ]
