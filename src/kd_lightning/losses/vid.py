"""Variational information distillation: Ahn et al. (2019), "Variational Information Distillation
for Knowledge Transfer", section 2.2.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.map_term import MapTerm
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.term import Context, Reads, TermBatch
from kd_lightning.models.features import Output

SMALLEST_VARIANCE = 1e-5


def gaussian_loss(mean: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
    """Negative log-likelihood of the teacher's map, a scalar in at least float32.

    Equation 5 for a variance that is constant over positions, without the constant log(2 pi) / 2,
    averaged over all elements. It is negative where the map is predicted well.

    Args:
        mean: predicted map (B, C, H, W).
        teacher: the teacher's map (B, C, H, W).
        scale: (C,), of any sign; the variance of a channel is softplus(scale) + 1e-5.
    """
    variance = (F.softplus(at_least_float32(scale)) + SMALLEST_VARIANCE).view(1, -1, 1, 1)
    error = (at_least_float32(mean) - teacher).square() / variance
    return (error + variance.log()).mean() / 2


def initial_scale(variance: float) -> float:
    """The `scale` of `gaussian_loss` with this variance, which is above 1e-5."""
    soft = variance - SMALLEST_VARIANCE
    return soft + math.log(-math.expm1(-soft))  # log(exp(soft) - 1), which would overflow


class VID(MapTerm):
    """Maximises a lower bound of the mutual information of the paired layers.

    The teacher's map is modelled as a Gaussian whose mean is computed from the student's map by
    three 1x1 convolutions with ReLU between them, and whose variance is learned for each channel.
    Summed over pairs, as in RepDistiller (Tian et al. 2020), whose weight is 1; the authors' own
    code is not public.

    Args:
        student_layers, teacher_layers, pairs: the layers; see `LayerPairs`.
        variance: initial variance; finite and above 1e-5.
    """

    def __init__(
        self,
        student_layers: str | Sequence[str] = "stages",
        teacher_layers: str | Sequence[str] = "stages",
        pairs: Sequence[Sequence[str]] | None = None,
        variance: float = 5.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers, pairs)
        if not SMALLEST_VARIANCE < variance < math.inf:
            raise ValueError(
                f"variance must be a number above {SMALLEST_VARIANCE:g}, not {variance}"
            )
        self.variance = variance
        self.means = nn.ModuleList()
        self.scales = nn.ParameterList()

    def setup(self, context: Context) -> Reads:
        """Select the pairs and create their regressors.

        Raises:
            ValueError: a layer does not exist, or its output is not a map.
        """
        reads = super().setup(context)
        for student, teacher, _ in self.layers.chosen:
            self.means.append(regressor(student.channels, teacher.channels))
            scale = torch.full((teacher.channels,), initial_scale(self.variance))
            self.scales.append(nn.Parameter(scale))
        return reads

    def forward(self, student: Output, remembered: dict[str, Tensor], batch: TermBatch) -> Tensor:
        """Negative log-likelihood of the teacher's maps, without constants; a scalar."""
        return torch.stack(
            [
                gaussian_loss(mean(given), wanted, scale)
                for mean, scale, (given, wanted) in zip(
                    self.means, self.scales, self.matched(student, remembered), strict=True
                )
            ]
        ).sum()


def regressor(inputs: int, outputs: int) -> nn.Sequential:
    """Three 1x1 convolutions with ReLU between them."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 1, bias=False),
    )
