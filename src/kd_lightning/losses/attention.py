"""Attention transfer: Zagoruyko & Komodakis (2017), "Paying More Attention to Attention",
section 3.1 (activation-based).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.term import Context, Reads, Shapes, Term, TermBatch
from kd_lightning.models.features import LayerShapes, Output, unknown_layer
from kd_lightning.models.layouts import Layout


class _MeanSquare(torch.autograd.Function):
    """Mean over channels of the squared activations, in float32.

    A custom autograd function, because autograd would save a float32 copy of the whole feature map
    and read it several times; this saves only its input. Computed as a squared norm, which is
    reduced in float32 without a copy.
    """

    @staticmethod
    def forward(ctx: Any, feature_map: Tensor) -> Tensor:
        ctx.save_for_backward(feature_map)
        dtype = torch.promote_types(feature_map.dtype, torch.float32)
        norm = torch.linalg.vector_norm(feature_map, dim=1, dtype=dtype)
        return norm.square_().div_(feature_map.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (feature_map,) = ctx.saved_tensors
        scale = gradients[0] * (2 / feature_map.shape[1])
        return feature_map * scale.unsqueeze(1).to(feature_map.dtype)


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
    if size is not None and size != tuple(energy.shape[1:]):
        energy = F.adaptive_avg_pool2d(energy.unsqueeze(1), size)
    return F.normalize(energy.flatten(1), dim=1)


class Attention(Term):
    """Matches the attention maps of student and teacher for pairs of layers.

    By default layers are paired by resolution: at every height and width that occurs in both
    networks, the deepest candidate layers are paired; if there is no common resolution, the deepest
    layers of both. Alternatively, `pairs` gives the pairs, of any channel counts and sizes: the
    larger map is pooled to the smaller.

    The output of a layer may be a map (B, C, H, W) or (B, H, W, C), or tokens (B, N, C) that form a
    grid, with or without class and register tokens; see `find_layouts`.

    Args:
        student_layers: candidate layers of the student, from input to output.
        teacher_layers: candidate layers of the teacher, from input to output.
        pairs: explicit pairs [[student layer, teacher layer], ...].
        distance: ``mean_square`` is the mean over batch and positions of (Q_s - Q_t)^2, as in the
            authors' code, where the weight is 1000; ``norm`` is ||Q_s - Q_t||_2, averaged over the
            batch, as in equation 2 of the paper, whose beta / 2 is this term's weight. Both are
            summed over pairs.
    """

    def __init__(
        self,
        student_layers: Sequence[str] = (),
        teacher_layers: Sequence[str] = (),
        pairs: Sequence[Sequence[str]] | None = None,
        distance: str = "mean_square",
    ) -> None:
        super().__init__()
        if distance not in ("mean_square", "norm"):
            raise ValueError(f"distance must be 'mean_square' or 'norm', not '{distance}'")
        if pairs is not None and (not pairs or any(len(pair) != 2 for pair in pairs)):
            raise ValueError("pairs must be a list of [student layer, teacher layer]")
        if pairs is None and not (student_layers and teacher_layers):
            raise ValueError("attention needs layers of both networks, or pairs of layers")
        self.distance = distance
        self.candidates = (tuple(student_layers), tuple(teacher_layers))
        self.pairs = [(student, teacher) for student, teacher in pairs or ()]
        self.sizes: list[tuple[int, int]] = []
        self._student: dict[str, Layout] = {}
        self._teacher: dict[str, Layout] = {}
        self._modified: frozenset[str] = frozenset()

    def setup(self, context: Context) -> Reads:
        """Select the pairs and the size at which each is compared.

        Raises:
            ValueError: a layer does not exist, or its output is not a map.
        """
        explicit = bool(self.pairs)
        names = tuple(zip(*self.pairs, strict=True)) if explicit else self.candidates
        self._student = _layouts("student", context.student, names[0])
        self._teacher = _layouts("teacher", context.teacher, names[1])
        if not explicit:
            self.pairs = pair_by_resolution(
                {layer: layout.size for layer, layout in self._student.items()},
                {layer: layout.size for layer, layout in self._teacher.items()},
            )
        self.sizes = [
            (
                min(self._student[s].height, self._teacher[t].height),
                min(self._student[s].width, self._teacher[t].width),
            )
            for s, t in self.pairs
        ]
        if isinstance(context.teacher, LayerShapes):
            self._modified = context.teacher.modified
        return Reads(
            student=tuple(dict.fromkeys(s for s, _ in self.pairs)),
            teacher=tuple(dict.fromkeys(t for _, t in self.pairs)),
            teacher_logits=False,
        )

    def remember(self, teacher: Output) -> Tensor:
        """The teacher's attention maps, concatenated: (B, sum of h * w)."""
        return torch.cat(
            [
                attention_map(self._teacher[layer].to_map(teacher.features[layer]), size)
                for (_, layer), size in zip(self.pairs, self.sizes, strict=True)
            ],
            dim=1,
        )

    def depends_on(self) -> dict[str, Any]:
        """The teacher's layers and map sizes; independent of the student and of `distance`."""
        layers = [layer for _, layer in self.pairs]
        return {
            "maps": [
                [layer, *size, *self._how_read(layer)]
                for layer, size in zip(layers, self.sizes, strict=True)
            ]
        }

    def _how_read(self, layer: str) -> list[Any]:
        """Empty for an unmodified map (B, C, H, W), to keep caches of earlier versions valid."""
        how: list[Any] = []
        if self._teacher[layer].kind != "channels_first":
            how += self._teacher[layer]
        if layer in self._modified:
            how.append("before it is modified in place")
        return how

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """Compare the student's feature maps with the teacher's attention maps; a scalar."""
        targets = remembered.split([height * width for height, width in self.sizes], dim=1)
        return torch.stack(
            [
                self._compare(
                    attention_map(self._student[layer].to_map(student.features[layer]), size),
                    target,
                )
                for (layer, _), size, target in zip(self.pairs, self.sizes, targets, strict=True)
            ]
        ).sum()

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.distance == "mean_square":
            return F.mse_loss(student, teacher)
        return torch.linalg.vector_norm(student - teacher, dim=1).mean()


def _layouts(whose: str, shapes: Shapes, layers: Sequence[str]) -> dict[str, Layout]:
    """The layout of every layer. Without `LayerShapes`, (C, H, W) is assumed.

    Raises:
        ValueError: a layer does not exist, or its output is not a map.
    """
    if isinstance(shapes, LayerShapes):
        known, others = shapes.layouts, shapes.others
        if any(layer in shapes.inputs for layer in layers):
            known = known | shapes.input_layouts
    else:
        maps = {name: shape for name, shape in shapes.items() if len(shape) == 3}
        known = {name: Layout("channels_first", *shape[1:]) for name, shape in maps.items()}
        others = {}
    for layer in layers:
        if layer not in (*shapes, *others, *known):
            raise ValueError(f"in the {whose} {unknown_layer(layer, shapes)}")
        if layer not in known:
            raise ValueError(
                f"layer '{layer}' of the {whose} outputs {others.get(layer) or shapes[layer]}, "
                "but attention needs a map (channels, height, width)"
            )
    return {layer: known[layer] for layer in layers}


def pair_by_resolution(
    student: dict[str, tuple[int, int]], teacher: dict[str, tuple[int, int]]
) -> list[tuple[str, str]]:
    """Pair the deepest layers at each common resolution.

    Args:
        student: layer name to (height, width), from input to output.
        teacher: the same for the teacher.
    """
    # Later layers overwrite earlier ones, so the deepest remains at each resolution.
    deepest_student = {size: layer for layer, size in student.items()}
    deepest_teacher = {size: layer for layer, size in teacher.items()}
    shared = [size for size in deepest_student if size in deepest_teacher]
    if shared:
        return [(deepest_student[size], deepest_teacher[size]) for size in shared]
    return [(list(student)[-1], list(teacher)[-1])]
