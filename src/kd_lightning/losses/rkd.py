"""Relational knowledge distillation: Park, Kim, Lu & Cho (2019), "Relational Knowledge
Distillation".
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd_lightning.losses.arguments import not_negative
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.scale import power_of_two, scaled, to_usual_scale
from kd_lightning.losses.term import TermBatch
from kd_lightning.losses.vectors import VectorTerm, unit
from kd_lightning.models.features import Output

LARGEST = 2**24
"""Number of elements of the largest intermediate tensor: 64 MB in float32."""

SMALLEST_DISTANCE = 1e-6
"""Distances are at least this, as in the authors' code; relative to the largest of the features
where that is unusually small."""


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 loss of the pairwise distances, each divided by the mean distance; a scalar.

    Equations 5 to 7 of the paper, averaged over all B^2 pairs, including those of an image with
    itself. Two equal vectors have the distance 1e-6 without a gradient. For a batch of 1 the loss
    is 0, where the authors' code gives NaN.

    The differences are computed for some images at a time and again in the backward pass, so that
    the memory is of the order of B^2, not B^2 D. There are about 3 B^2 D operations per network and
    pass.

    Args:
        student: vectors (B, D).
        teacher: vectors (B, D'), of any length.
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def _relative_distances(vectors: Tensor) -> Tensor:
    """Distances (B, B), divided by the mean distance of different images."""
    vectors, factor = at_least_float32(vectors), power_of_two(vectors)
    count = len(vectors)
    # Not from scalar products, which lose all digits of small distances in float32.
    distances = torch.cat(_in_parts(_distances, scaled(vectors, factor)))
    distances = distances.clamp(min=SMALLEST_DISTANCE * factor.clamp(max=1))
    distances = distances.masked_fill(torch.eye(count, dtype=torch.bool, device=vectors.device), 0)
    return distances / (distances.sum() / (count * (count - 1))) if count > 1 else distances


def _distances(anchors: Tensor, vectors: Tensor) -> Tensor:
    """Distances (A, B) of anchors (A, D) from vectors (B, D)."""
    return torch.linalg.vector_norm(vectors - anchors[:, None], dim=2)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 loss of the cosines of the angles of all triples of images; a scalar.

    Equations 8 to 10 of the paper, averaged over all B^3 triples, including those in which an image
    occurs twice. Where two images coincide, the direction between them is 0 without a gradient; the
    authors' code has a gradient of the order of 10^10 there.

    The directions and cosines are computed for some images at a time and again in the backward
    pass: memory of 64 MB for each of several tensors, instead of the order of B^3 + B^2 D. There
    are B^3 D multiplications per network in the forward pass, and twice as many altogether in the
    backward pass: with B = 256 and D = 512 about 50 * 10^9, with D = 4096 eight times as many. With
    the usual B = 64 the loss is cheap.

    Args:
        student: vectors (B, D).
        teacher: vectors (B, D'), of any length.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = to_usual_scale(student), to_usual_scale(teacher)
        parts = _in_parts(_angle_differences, student, teacher)
        return torch.stack(parts).sum() / len(student) ** 3


def _angle_differences(
    student_anchors: Tensor, teacher_anchors: Tensor, student: Tensor, teacher: Tensor
) -> Tensor:
    """Sum of the smooth L1 losses of all triples with these anchors as the vertex; a scalar."""
    return F.smooth_l1_loss(
        _cosines(student_anchors, student), _cosines(teacher_anchors, teacher), reduction="sum"
    )


def _cosines(anchors: Tensor, vectors: Tensor) -> Tensor:
    """Cosines (A, B, B) of the angles at anchors (A, D) between all pairs of vectors (B, D)."""
    directions = unit(vectors - anchors[:, None])
    return directions @ directions.mT


def _in_parts(function: Callable[..., Tensor], *vectors: Tensor) -> list[Tensor]:
    """Results of ``function(*anchors, *vectors)`` for parts of the vectors as anchors.

    Args:
        function: called with a part of each of the vectors, and with all vectors.
        vectors: (B, D) of one or several networks.
    """
    count = len(vectors[0])
    width = max(count, *(part.shape[1] for part in vectors))
    size = max(1, LARGEST // (count * width))
    if size >= count:
        return [function(*vectors, *vectors)]
    return [
        checkpoint(function, *anchors, *vectors, use_reentrant=False, preserve_rng_state=False)
        for anchors in zip(*(part.split(size) for part in vectors), strict=True)
    ]


class RKD(VectorTerm):
    """Matches distances between two images and angles between three.

    Args:
        student_layer, teacher_layer: see `VectorTerm`.
        distance_weight: weight of `distance_loss`. The defaults are those for CIFAR-100 in
            RepDistiller; the authors use 1 and 2 for metric learning.
        angle_weight: weight of `angle_loss`.
    """

    def __init__(
        self,
        student_layer: str = "embedding",
        teacher_layer: str = "embedding",
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer)
        self.distance_weight = not_negative("distance_weight", distance_weight)
        self.angle_weight = not_negative("angle_weight", angle_weight)
        if not distance_weight and not angle_weight:
            raise ValueError("distance_weight and angle_weight must not both be 0")

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """Compare the relations of the images of the batch; a scalar."""
        vectors = self.student.of(student)
        parts = [
            weight * loss(vectors, remembered)
            for weight, loss in (
                (self.distance_weight, distance_loss),
                (self.angle_weight, angle_loss),
            )
            if weight
        ]
        return torch.stack(parts).sum()
