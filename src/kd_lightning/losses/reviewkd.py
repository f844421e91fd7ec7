"""Knowledge review: Chen et al. (2021), "Distilling Knowledge via Knowledge Review", section 3."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.map_term import MapTerm
from kd_lightning.losses.pairs import FeatureMap, Pair
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.projectors import convolution_norm
from kd_lightning.losses.term import Context, Reads, TermBatch
from kd_lightning.models.features import LayerShapes, Output
from kd_lightning.models.layouts import Layout
from kd_lightning.models.pooling import pool
from kd_lightning.models.roles import select
from kd_lightning.models.shapes import Shapes

LEVELS = (4, 2, 1)
MOST_CHANNELS = 512


def hierarchical_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss of two maps (B, C, H, W), in at least float32; a scalar.

    Section 3.3: mean squared differences of the maps, and of both after average pooling to 4x4, 2x2
    and 1x1, as far as that is smaller. Each has half the weight of the one before; the weights are
    divided by their sum, as in the authors' code.
    """
    difference = at_least_float32(student) - at_least_float32(teacher)
    levels = [level for level in LEVELS if level < min(difference.shape[2:])]
    parts = [difference, *(pool(difference, (level, level)) for level in levels)]
    weights = [0.5**number for number in range(len(parts))]
    losses = [weight * part.square().mean() for weight, part in zip(weights, parts, strict=True)]
    return torch.stack(losses).sum() / sum(weights)


class AttentionFusion(nn.Module):
    """Attention-based fusion (ABF, section 3.3) of a map with the fused deeper maps.

    Args:
        inputs: channels of the student's map.
        middle: channels of the fused maps.
        outputs: channels of the teacher's map.
        fuse: False for the deepest map, which has no deeper ones.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, fuse: bool) -> None:
        super().__init__()
        self.reduce = convolution_norm(inputs, middle)
        self.expand = convolution_norm(middle, outputs, kernel=3)
        self.attention = nn.Conv2d(2 * middle, 2, 1) if fuse else None
        for part in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(part.get_parameter("0.weight"), a=1)

    def forward(
        self, x: Tensor, deeper: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Fuse a map with the deeper ones.

        Args:
            x: the student's map (B, inputs, H, W).
            deeper: fused deeper maps (B, middle, h, w); None for the deepest.
            size: height and width of the results.

        Returns:
            The map to compare with the teacher's (B, outputs, *size), and the fused maps (B,
            middle, *size). Maps are enlarged by repeating values.
        """
        x = self.reduce(x)
        if self.attention is not None and deeper is not None:
            deeper = resize(deeper, (x.shape[2], x.shape[3]))
            own, other = self.attention(torch.cat([x, deeper], dim=1)).sigmoid().split(1, dim=1)
            x = x * own + deeper * other
        x = resize(x, size)
        return self.expand(x), x


def resize(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (B, C, H, W) of another size, by nearest-neighbour interpolation."""
    if tuple(feature_map.shape[2:]) == size:
        return feature_map
    return F.interpolate(feature_map, size, mode="nearest")


class Pooled(FeatureMap):
    """A layer whose output, averaged over positions, is a 1x1 map."""

    def of(self, output: Output) -> Tensor:
        """The map (B, C, 1, 1) in a model's output (B, C) or (B, C, H, W)."""
        features = output.features[self.layer]
        return features.reshape(*features.shape[:2], -1).mean(dim=2)[:, :, None, None]


class ReviewKD(MapTerm):
    """Matches the teacher's maps with fusions of the student's maps of the same and deeper layers.

    By default, the pairs are the stages and, as a 1x1 map, the embedding, as in the authors' code.
    Summed over pairs; the authors' weights for CIFAR-100 are 0.6 to 8, depending on the networks.

    Unlike in other terms, maps are compared at the size of the teacher's: a smaller map of the
    student is enlarged by the fusion, as in the authors' code. A larger one is average-pooled.

    Args:
        student_layers, teacher_layers, pairs: the layers, from input to output; see `LayerPairs`.
        embedding: whether to compare the embeddings too.
        warmup: fraction of the training, in [0, 1], during which the loss is scaled up linearly
            from 0. The authors' 20 of 240 epochs, by default.
    """

    def __init__(
        self,
        student_layers: str | Sequence[str] = "stages",
        teacher_layers: str | Sequence[str] = "stages",
        pairs: Sequence[Sequence[str]] | None = None,
        embedding: bool = True,
        warmup: float = 20 / 240,
    ) -> None:
        super().__init__(student_layers, teacher_layers, pairs)
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup must be in [0, 1], not {warmup}")
        self.embedding, self.warmup = embedding, warmup

    def setup(self, context: Context) -> Reads:
        """Select the pairs and create their fusions.

        Raises:
            ValueError: a layer does not exist, its output is not a map, or the embedding is not
                found.
        """
        super().setup(context)
        chosen = [pair._replace(size=pair.teacher.layout.size) for pair in self.layers.chosen]
        if self.embedding:
            student, teacher = (
                _embedding(whose, shapes, context.num_classes)
                for whose, shapes in (("student", context.student), ("teacher", context.teacher))
            )
            chosen.append(Pair(student, teacher, (1, 1)))
        self.layers.chosen = chosen
        middle = min(MOST_CHANNELS, chosen[-1].student.channels)
        self.fusions = nn.ModuleList(
            AttentionFusion(
                pair.student.channels, middle, pair.teacher.channels, fuse=pair is not chosen[-1]
            )
            for pair in chosen
        )
        return self.layers.reads()

    def forward(self, student: Output, remembered: dict[str, Tensor], batch: TermBatch) -> Tensor:
        """Sum of `hierarchical_loss` over pairs, times the warm-up; a scalar."""
        losses, deeper = [], None
        for number in reversed(range(len(self.fusions))):
            pair = self.layers.chosen[number]
            x = pair.student.of(student)
            x = pool(x, (min(x.shape[2], pair.size[0]), min(x.shape[3], pair.size[1])))
            fused, deeper = self.fusions[number](x, deeper, pair.size)
            losses.append(hierarchical_loss(fused, remembered[str(number)]))
        loss = torch.stack(losses).sum()
        return loss * min(1.0, batch.progress / self.warmup) if self.warmup else loss


def _embedding(whose: str, shapes: Shapes, num_classes: int) -> Pooled:
    """The embedding of a model, averaged over positions if it is a map.

    Raises:
        ValueError: it is not found, or has an unexpected shape.
    """
    (layer,) = select("embedding", shapes, num_classes)
    known = {**shapes, **shapes.inputs} if isinstance(shapes, LayerShapes) else shapes
    shape = known.get(layer, ())
    if len(shape) not in (1, 3):
        raise ValueError(
            f"the embedding of the {whose}, '{layer}', must be a vector or a map, not {shape}; "
            "choose embedding: false"
        )
    return Pooled(layer, Layout("channels_first", 1, 1), shape[0])
