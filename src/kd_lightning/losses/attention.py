"""Attention transfer: Zagoruyko & Komodakis (2017), "Paying More Attention to Attention",
section 3.1 (activation-based).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.map_term import MapTerm
from kd_lightning.losses.scale import power_of_two, scaled
from kd_lightning.losses.term import TermBatch
from kd_lightning.models.features import Output
from kd_lightning.models.pooling import pool


class _MeanSquare(torch.autograd.Function):
    """Mean over channels of the squared activations, in float32, brought to a usual scale.

    A custom autograd function, because autograd would save a float32 copy of the whole feature map
    and read it several times; this saves only its input. Computed as a squared norm, which is
    reduced in float32 without a copy. The scale is that of the norms, for which the map is not read
    again: between 1e-18 and 1e18 squares neither overflow nor vanish.
    """

    @staticmethod
    def forward(ctx: Any, feature_map: Tensor) -> Tensor:
        dtype = torch.promote_types(feature_map.dtype, torch.float32)
        norm = torch.linalg.vector_norm(feature_map, dim=1, dtype=dtype)
        factor = power_of_two(norm)
        ctx.save_for_backward(feature_map, factor)
        return scaled(norm, factor).square_().div_(feature_map.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        feature_map, factor = ctx.saved_tensors
        scale = gradients[0] * (2 / feature_map.shape[1]) * factor
        limit = torch.finfo(scale.dtype).max / 2  # infinity times a map of zeros would be NaN
        scale = scale.clamp(-limit, limit)
        # The scale of a map of zeros is beyond the range of float16, but not of bfloat16.
        if feature_map.dtype == torch.bfloat16:
            scale = scale.bfloat16()
        return (scaled(feature_map, factor) * scale.unsqueeze(1)).to(feature_map.dtype)


def attention_map(feature_map: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Attention map: mean over channels of A^2, flattened and L2-normalised per image.

    Squared before resizing, so that activations of opposite sign do not cancel.

    Args:
        feature_map: A, (B, C, H, W).
        size: (h, w) to average-pool the map to; None: no pooling.

    Returns:
        (B, h * w), float32.
    """
    energy = _MeanSquare.apply(feature_map)
    if size is not None:
        energy = pool(energy.unsqueeze(1), size)
    return F.normalize(energy.flatten(1), dim=1)


class Attention(MapTerm):
    """Matches the attention maps of student and teacher for pairs of layers; see `LayerPairs`.

    Args:
        student_layers: layers of the student; see `LayerPairs`.
        teacher_layers: layers of the teacher.
        pairs: pairs of layers, instead of both.
        distance: ``mean_square`` is the mean over batch and positions of (Q_s - Q_t)^2, as in the
            authors' code, where the weight is 1000; ``norm`` is ||Q_s - Q_t||_2, averaged over the
            batch, as in equation 2 of the paper, whose beta / 2 is this term's weight. Both are
            summed over pairs.
    """

    def __init__(
        self,
        student_layers: str | Sequence[str] = "stages",
        teacher_layers: str | Sequence[str] = "stages",
        pairs: Sequence[Sequence[str]] | None = None,
        distance: str = "mean_square",
    ) -> None:
        super().__init__(student_layers, teacher_layers, pairs)
        if distance not in ("mean_square", "norm"):
            raise ValueError(f"distance must be 'mean_square' or 'norm', not '{distance}'")
        self.distance = distance

    def remember(self, teacher: Output) -> Tensor:
        """The teacher's attention maps, concatenated: (B, sum of h * w)."""
        return torch.cat(
            [attention_map(pair.teacher.of(teacher), pair.size) for pair in self.layers.chosen],
            dim=1,
        )

    def depends_on(self) -> dict[str, Any]:
        """The teacher's layers and map sizes; independent of the student and of `distance`."""
        return {"maps": self.layers.key()}

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """Compare the student's feature maps with the teacher's attention maps; a scalar."""
        pairs = self.layers.chosen
        targets = remembered.split([height * width for *_, (height, width) in pairs], dim=1)
        return torch.stack(
            [
                self._compare(attention_map(pair.student.of(student), pair.size), target)
                for pair, target in zip(pairs, targets, strict=True)
            ]
        ).sum()

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.distance == "mean_square":
            return F.mse_loss(student, teacher)
        return torch.linalg.vector_norm(student - teacher, dim=1).mean()
