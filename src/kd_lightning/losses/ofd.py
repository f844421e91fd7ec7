"""Overhaul of feature distillation: Heo et al. (2019), "A Comprehensive Overhaul of Feature
Distillation", section 3.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_lightning.losses.map_term import MapTerm
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.projectors import convolution_norm
from kd_lightning.losses.term import Context, Reads, TermBatch
from kd_lightning.models.features import LayerShapes, Output
from kd_lightning.models.pooling import pool
from kd_lightning.models.shapes import Shapes
from kd_lightning.transfer import to_device

RARELY = 0.001
"""Probability of negative values below which their mean is not used as the margin."""


def partial_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared differences of two maps, summed, averaged over the batch; in at least float32.

    Equation 5: where the teacher's value is not positive, the student's may be anything below it.
    The authors divide by 1000, which is left to the weight.

    Args:
        student: map (B, C, H, W).
        teacher: map (B, C, H, W), not below the margins.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    counts = (student > teacher) | (teacher > 0)
    return ((student - teacher).square() * counts).sum() / len(student)


def normal_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """Mean of the negative outputs of BatchNorm, if these are normally distributed (section 3.3).

    Where negative outputs have a probability of at most 0.001, -3 |weight|, as in the authors'
    code. A weight of 0 is the limit of small ones: all outputs are equal to the bias.

    Args:
        weight: of BatchNorm (C,): the standard deviation of its outputs, of any sign.
        bias: of BatchNorm (C,): the mean of its outputs.

    Returns:
        (C,), not positive, in at least float32.
    """
    deviation, mean = at_least_float32(weight).abs(), at_least_float32(bias)
    constant = deviation == 0
    distance = mean / torch.where(constant, 1.0, deviation)
    share = torch.special.ndtr(-distance)
    density = (-(distance**2) / 2).exp() / math.sqrt(2 * math.pi)
    margin = mean - deviation * density / share.clamp(min=RARELY)
    margin = torch.where(share > RARELY, margin, -3 * deviation)
    return torch.where(constant, mean.clamp(max=0), margin)


def image_margin(feature_map: Tensor) -> Tensor:
    """Mean of the negative values in each channel of each image: (B, C, H, W) to (B, C, 1, 1).

    0 where there are none, as after a ReLU.
    """
    count = (feature_map < 0).sum(dim=(2, 3), keepdim=True)
    return feature_map.clamp(max=0).sum(dim=(2, 3), keepdim=True) / count.clamp(min=1)


class OFD(MapTerm):
    """Matches the teacher's maps above a margin, after a trained connector of the student's.

    The connector is a 1x1 convolution and BatchNorm. Pairs, from input to output, have the weights
    ..., 1/4, 1/2, 1, as in the authors' code; they are summed. The loss is a sum over all elements;
    the authors' weight for CIFAR-100 is 0.001.

    The authors read the maps before the ReLU, of both networks. Any layer can be read here; name
    those before a ReLU where they are modules: "relu:input", or the BatchNorm before it. By default
    the stages are read as they are. The negative values of the teacher are replaced with a margin:

    - If the layer that is read is a BatchNorm, `normal_margin` of its weights, as by the authors.
    - Otherwise `image_margin`: unlike an average over the batch, a view's target then depends on
      nothing else. It is 0 after a ReLU, where the student is free to be negative.

    Args:
        student_layers, teacher_layers, pairs: the layers; see `LayerPairs`.
    """

    def setup(self, context: Context) -> Reads:
        """Select the pairs and create their connectors.

        Raises:
            ValueError: a layer does not exist, or its output is not a map.
        """
        reads = super().setup(context)
        self.connectors = nn.ModuleList(
            connector(student.channels, teacher.channels)
            for student, teacher, _ in self.layers.chosen
        )
        # In a list, so that the teacher's layers are no submodules of this term. Their weights may
        # be loaded later.
        self._norms = [
            _batch_norm(context.teacher, pair.teacher.layer) for pair in self.layers.chosen
        ]
        return reads

    def remember(self, teacher: Output) -> dict[str, Tensor]:
        """For each pair, the teacher's map, not below its margins: (B, C, h, w)."""
        found = {}
        for number, (pair, norm) in enumerate(zip(self.layers.chosen, self._norms, strict=True)):
            whole = at_least_float32(pair.teacher.of(teacher))
            margin = image_margin(whole) if norm is None else _margin(norm, whole)
            found[str(number)] = pool(torch.maximum(whole, margin), pair.size)
        return found

    def depends_on(self) -> dict[str, Any]:
        """For each map, the teacher's layer, the size, and the kind of the margin."""
        kinds = ["image" if norm is None else "normal" for norm in self._norms]
        keys = zip(self.layers.key(), kinds, strict=True)
        return {"parts": {str(number): [*key, kind] for number, (key, kind) in enumerate(keys)}}

    def forward(self, student: Output, remembered: dict[str, Tensor], batch: TermBatch) -> Tensor:
        """Weighted sum of `partial_loss` over pairs; a scalar."""
        losses = [
            partial_loss(connect(given), wanted)
            for connect, (given, wanted) in zip(
                self.connectors, self.matched(student, remembered), strict=True
            )
        ]
        return stage_sum(losses)


def stage_sum(losses: list[Tensor]) -> Tensor:
    """Sum with the weights ..., 1/4, 1/2, 1, from input to output."""
    return torch.stack([loss / 2**depth for depth, loss in enumerate(reversed(losses))]).sum()


def connector(inputs: int, outputs: int) -> nn.Sequential:
    """A 1x1 convolution and BatchNorm, initialised as by the authors."""
    connect = convolution_norm(inputs, outputs)
    nn.init.kaiming_normal_(connect.get_parameter("0.weight"), mode="fan_out")
    return connect


def _batch_norm(shapes: Shapes, layer: str) -> _BatchNorm | None:
    """The layer, if it is a BatchNorm without an activation of its own."""
    if not isinstance(shapes, LayerShapes):
        return None
    module = dict(shapes.model.named_modules(remove_duplicate=False)).get(layer)
    plain = type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    return cast(_BatchNorm, module) if plain else None


def _margin(norm: _BatchNorm, like: Tensor) -> Tensor:
    """The margins (1, C, 1, 1) of a BatchNorm, on the device and of the type of a map."""
    if norm.affine:
        margin = normal_margin(norm.weight, norm.bias)
    else:
        margin = normal_margin(torch.ones(norm.num_features), torch.zeros(norm.num_features))
    return to_device(margin.view(1, -1, 1, 1), like.device).to(like)
