"""Self-distillation from deep to shallow layers: Zhang et al. (2019), "Be Your Own Teacher: Improve
the Performance of Convolutional Neural Networks via Self Distillation", section 3.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kd_lightning.losses.arguments import positive
from kd_lightning.losses.cross_entropy import CrossEntropy
from kd_lightning.losses.logit import soft_target_loss
from kd_lightning.losses.pairs import FeatureMap, feature_maps
from kd_lightning.losses.projectors import convolution_norm
from kd_lightning.losses.term import Context, Reads, Term, TermBatch
from kd_lightning.models.features import Output
from kd_lightning.models.roles import select


class AuxiliaryHead(nn.Module):
    """A classifier of a feature map: 3x3 convolution, BatchNorm, ReLU, average pooling, linear.

    Args:
        inputs: channels of the map.
        outputs: channels of the convolution.
        classes: number of classes.
    """

    def __init__(self, inputs: int, outputs: int, classes: int) -> None:
        super().__init__()
        self.convolution = nn.Sequential(*convolution_norm(inputs, outputs, 3), nn.ReLU())
        self.linear = nn.Linear(outputs, classes)

    def forward(self, feature_map: Tensor) -> Tensor:
        """A map (B, C, H, W) to logits (B, classes)."""
        return self.linear(self.convolution(feature_map).mean(dim=(2, 3)))


class OwnTeacher(Term):
    """The student's last layer teaches its earlier stages; no other teacher is needed.

    Every stage but the last gets an auxiliary classifier, which is trained with the labels and with
    the student's own softened predictions, and is no part of the student. The paper's third loss,
    between feature maps, is left out: with its weight in common code, 1e-6, it has no effect.

    The mean over the auxiliary classifiers of (1 - alpha) CE + alpha T^2 KL.

    Args:
        alpha: share of the predictions against the labels, in [0, 1].
        temperature: T, positive.
        layers: the stages of the student: roles (see `roles.select`) or names.
    """

    needs_teacher: ClassVar[bool] = False

    def __init__(
        self, alpha: float = 0.1, temperature: float = 3.0, layers: str | list[str] = "stages"
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], not {alpha}")
        self.alpha = alpha
        self.temperature = positive("temperature", temperature)
        self._label_loss = CrossEntropy()
        self._layers = layers
        self._maps: list[FeatureMap] = []
        self.heads = nn.ModuleList()

    def setup(self, context: Context) -> Reads:
        """Create the auxiliary classifiers.

        Raises:
            ValueError: a layer does not exist, or there is only one.
        """
        names = select(self._layers, context.student, context.num_classes)
        maps = feature_maps("student", context.student, names)
        if len(maps) < 2:
            raise ValueError(f"at least two layers are needed, but only {names[0]} was found")
        *self._maps, last = maps
        self.heads = nn.ModuleList(
            AuxiliaryHead(part.channels, last.channels, context.num_classes) for part in self._maps
        )
        return Reads(student=tuple(part.layer for part in self._maps))

    def forward(self, student: Output, remembered: None, batch: TermBatch) -> Tensor:
        """The mean loss of the auxiliary classifiers; a scalar."""
        deep = student.logits.detach()
        losses = []
        for part, head in zip(self._maps, self.heads, strict=True):
            logits = head(part.of(student))
            labels = self._label_loss(Output(logits, {}), None, batch)
            softened = soft_target_loss(logits, deep, self.temperature)
            losses.append(torch.lerp(labels, softened, self.alpha))
        return torch.stack(losses).mean()
