"""Neuron selectivity transfer: Huang & Wang (2017), "Like What You Like: Knowledge Distill via
Neuron Selectivity Transfer", section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.map_term import MapTerm
from kd_lightning.losses.pairs import Pair
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.scale import to_usual_scale
from kd_lightning.losses.term import TermBatch
from kd_lightning.models.features import Output
from kd_lightning.models.pooling import pool


def selectivity(feature_map: Tensor) -> Tensor:
    """The map of each channel, L2-normalised: (B, C, H, W) to (B, C, H * W), at least float32.

    A map of zeros stays zero.
    """
    return F.normalize(to_usual_scale(feature_map).flatten(2), dim=2)


def gram(channels: Tensor) -> Tensor:
    """Products of positions, averaged over channels: (B, C, P) to (B, P, P)."""
    with _full_precision(channels):
        return channels.transpose(1, 2) @ channels / channels.shape[1]


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the channels' maps, averaged over the batch; a scalar.

    Equation 4 with the polynomial kernel (x^T y)^2 of normalised maps. It equals the squared
    Frobenius distance of the position Gram matrices of both networks, so that the kernel of all
    pairs of channels is never computed where there are fewer positions than channels.

    Args:
        student: map (B, C, H, W).
        teacher: map (B, C', H, W), of the same size.
    """
    channels = selectivity(teacher)
    if channels.shape[2] < channels.shape[1]:
        return gram_distance(selectivity(student), gram(channels))
    return kernel_distance(selectivity(student), channels)


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of `nst_loss`, from `selectivity` (B, C, P) and the teacher's `gram` (B, P, P)."""
    return (gram(student) - teacher).square().sum(dim=(1, 2)).mean()


def kernel_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of `nst_loss`, from `selectivity` (B, C, P) of both networks."""
    with _full_precision(student):
        mixed = (student @ teacher.transpose(1, 2)).square().mean()
    return _own_kernel(student) + _own_kernel(teacher) - 2 * mixed


def _own_kernel(channels: Tensor) -> Tensor:
    """Mean kernel of the pairs of channels (B, C, P) of one network."""
    if channels.shape[2] < channels.shape[1]:
        return gram(channels).square().sum(dim=(1, 2)).mean()
    with _full_precision(channels):
        return (channels @ channels.transpose(1, 2)).square().mean()


def _full_precision(values: Tensor) -> torch.autocast:
    """Without autocast, which would compute the products in half precision."""
    return torch.autocast(values.device.type, enabled=False)


class NST(MapTerm):
    """Matches the distributions of the channels' spatial activation patterns; see `nst_loss`.

    Numbers of channels may differ. Summed over pairs, as in RepDistiller (Tian et al. 2020), whose
    weight for CIFAR-100 is 50. The teacher's own part, which is constant, is included, as in the
    paper: the loss is 0 for equal maps.

    Args:
        student_layers, teacher_layers, pairs: the layers; see `LayerPairs`.
    """

    def remember(self, teacher: Output) -> dict[str, Tensor]:
        """For each pair, `selectivity` (B, C, P), or the smaller `gram` (B, P, P)."""
        found = {}
        for number, pair in enumerate(self.layers.chosen):
            channels = selectivity(pool(at_least_float32(pair.teacher.of(teacher)), pair.size))
            found[str(number)] = gram(channels) if _has_few_positions(pair) else channels
        return found

    def forward(self, student: Output, remembered: dict[str, Tensor], batch: TermBatch) -> Tensor:
        """Sum of `nst_loss` over pairs; a scalar."""
        losses = []
        for number, pair in enumerate(self.layers.chosen):
            given = selectivity(pool(pair.student.of(student), pair.size))
            distance = gram_distance if _has_few_positions(pair) else kernel_distance
            losses.append(distance(given, remembered[str(number)]))
        return torch.stack(losses).sum()


def _has_few_positions(pair: Pair) -> bool:
    height, width = pair.size
    return height * width < pair.teacher.channels
