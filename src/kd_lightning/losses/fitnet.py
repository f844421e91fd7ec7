"""Hints: Romero et al. (2015), "FitNets: Hints for Thin Deep Nets", section 2.2."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.map_term import MapTerm
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.projectors import convolution_norm
from kd_lightning.losses.term import Context, Reads, TermBatch
from kd_lightning.models.features import Output


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two maps (B, C, H, W), in at least float32; a scalar.

    Equation 3, averaged over all elements rather than summed, as in the widely used code.
    """
    return F.mse_loss(at_least_float32(student), at_least_float32(teacher))


class FitNet(MapTerm):
    """Matches one intermediate map of the teacher after a trained projection of the student's.

    The projector is a 1x1 convolution, BatchNorm and ReLU, as in RepDistiller (Tian et al. 2020),
    whose weight for CIFAR-100 is 100. Like its results, this trains with hint and labels at once;
    the paper has a first phase with the hint only.

    Of the paired layers, the middle one is used (the second of three, the deeper one of two): hints
    at the last layers leave the student too little freedom (section 2.2). All explicit `pairs` are
    used, summed.

    Args:
        student_layers, teacher_layers, pairs: the layers; see `LayerPairs`.
        projector: False: the maps themselves are compared, without ReLU; they must have the same
            number of channels.
    """

    def __init__(
        self,
        student_layers: str | Sequence[str] = "stages",
        teacher_layers: str | Sequence[str] = "stages",
        pairs: Sequence[Sequence[str]] | None = None,
        projector: bool = True,
    ) -> None:
        super().__init__(student_layers, teacher_layers, pairs)
        self.projector = projector
        self._all = pairs is not None
        self.projectors = nn.ModuleList()

    def setup(self, context: Context) -> Reads:
        """Select the pairs and create their projectors.

        Raises:
            ValueError: a layer does not exist, its output is not a map, or there is no projector
                and the numbers of channels differ.
        """
        super().setup(context)
        if not self._all:
            chosen = self.layers.chosen
            self.layers.chosen = [chosen[len(chosen) // 2]]
        for student, teacher, _ in self.layers.chosen:
            if self.projector:
                projection = convolution_norm(student.channels, teacher.channels)
                self.projectors.append(nn.Sequential(*projection, nn.ReLU(inplace=True)))
            elif student.channels == teacher.channels:
                self.projectors.append(nn.Identity())
            else:
                raise ValueError(
                    f"layer '{student.layer}' of the student has {student.channels} channels, but "
                    f"layer '{teacher.layer}' of the teacher has {teacher.channels}; choose other "
                    "layers or projector: true"
                )
        return self.layers.reads()

    def forward(self, student: Output, remembered: dict[str, Tensor], batch: TermBatch) -> Tensor:
        """Hint loss of the student's projected maps; a scalar."""
        return torch.stack(
            [
                hint_loss(project(given), wanted)
                for project, (given, wanted) in zip(
                    self.projectors, self.matched(student, remembered), strict=True
                )
            ]
        ).sum()
