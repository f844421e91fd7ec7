"""Probabilistic knowledge transfer: Passalis & Tefas (2018), "Learning Deep Representations with
Probabilistic Knowledge Transfer".
"""

import torch
from torch import Tensor

from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.scale import power_of_two, scaled
from kd_lightning.losses.term import TermBatch
from kd_lightning.losses.vectors import VectorTerm, unit
from kd_lightning.models.features import Output

EPSILON = 1e-7
"""Added to lengths and probabilities, as in the authors' code."""


def affinities(vectors: Tensor) -> Tensor:
    """(cos + 1) / 2 of all pairs, divided by the sums of the rows: (B, B), at least float32.

    Section 3 of the paper, with the cosine kernel. The diagonal is included, as in the authors'
    code.

    Args:
        vectors: (B, D). A zero vector has the cosine 0 with every vector, and no gradient.
    """
    vectors, factor = at_least_float32(vectors), power_of_two(vectors)
    directions = unit(scaled(vectors, factor), EPSILON * factor.clamp(max=1))
    # Rounding can leave a cosine slightly below -1, and a probability below 0.
    kernel = ((directions @ directions.T + 1) / 2).clamp(min=0)
    return kernel / kernel.sum(dim=1, keepdim=True)


def probability_transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's affinities p_s from the teacher's p_t; a scalar.

    Averaged over all B^2 pairs, as in the authors' code, which explains weights of the order of
    10^4: the divergence of one image is B times as large.

    Memory of the order of B^2, and B^2 D multiplications per network.

    Args:
        student: vectors (B, D).
        teacher: vectors (B, D'), of any length.
    """
    # Autocast would compute the cosines in half precision.
    with torch.autocast(student.device.type, enabled=False):
        given, wanted = affinities(student), affinities(teacher)
        # log(p_t / p_s) without cancellation: the probabilities are all close to 1 / B.
        ratio = torch.log1p((wanted - given) / (given + EPSILON))
        return (wanted * ratio).mean()


class PKT(VectorTerm):
    """Matches the probabilities that one image is chosen as the neighbour of another.

    Reads one vector per image; see `VectorTerm` for the arguments.
    """

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """Compare the affinities of the images of the batch; a scalar."""
        return probability_transfer_loss(self.student.of(student), remembered)
