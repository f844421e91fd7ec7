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

    Written out because autograd would keep a float32 copy of the whole feature map and walk over
    it several times. This keeps the map it is given. The squared norm, because it is reduced in
    float32 without any copy.
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
    """Where a layer looks: mean over channels of A^2, flattened, of unit length per image.

    Squared before it is resized, so that activations of opposite sign do not cancel.

    Args:
        feature_map: A, (B, C, H, W).
        size: (h, w) that the map is average-pooled to; as it is if None.

    Returns:
        (B, h * w), float32.
    """
    energy = _MeanSquare.apply(feature_map)
    if size is not None and size != tuple(energy.shape[1:]):
        energy = F.adaptive_avg_pool2d(energy.unsqueeze(1), size)
    return F.normalize(energy.flatten(1), dim=1)


class Attention(Term):
    """The student is drawn to look where the teacher looks, layer pair by layer pair.

    By default layers are paired by resolution: of the layers named, the deepest of each network at
    every height and width that both have; if they have none in common, the deepest with the
    deepest. `pairs` names the pairs instead, of any channel counts and sizes: the larger map is
    pooled to the smaller.

    A layer may put out a map (B, C, H, W) or (B, H, W, C), or tokens (B, N, C) that form a grid,
    with or without class and register tokens; see `find_layouts`.

    Args:
        student_layers: layers of the student to choose from, from input to output.
        teacher_layers: layers of the teacher to choose from, from input to output.
        pairs: explicit pairs [[student layer, teacher layer], ...].
        distance: ``mean_square`` is the mean over batch and positions of (Q_s - Q_t)^2, as in the
            authors' code, where the weight is 1000; ``norm`` is ||Q_s - Q_t||_2, the mean over the
            batch, as in equation 2 of the paper, whose beta / 2 is this term's weight. Either is
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
            raise ValueError("attention needs layers of both networks, or pairs of them")
        self.distance = distance
        self.candidates = (tuple(student_layers), tuple(teacher_layers))
        self.pairs = [(student, teacher) for student, teacher in pairs or ()]
        self.sizes: list[tuple[int, int]] = []
        self._student: dict[str, Layout] = {}
        self._teacher: dict[str, Layout] = {}
        self._modified: frozenset[str] = frozenset()

    def setup(self, context: Context) -> Reads:
        """Choose the pairs and the size at which each is compared.

        Raises:
            ValueError: a layer does not exist, or what it puts out is not a map.
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
        """The teacher's attention maps side by side: (B, sum of h * w)."""
        return torch.cat(
            [
                attention_map(self._teacher[layer].to_map(teacher.features[layer]), size)
                for (_, layer), size in zip(self.pairs, self.sizes, strict=True)
            ],
            dim=1,
        )

    def depends_on(self) -> dict[str, Any]:
        """The teacher's layers and the sizes of their maps; not the student's, nor the distance."""
        layers = [layer for _, layer in self.pairs]
        return {
            "maps": [
                [layer, *size, *self._how_read(layer)]
                for layer, size in zip(layers, self.sizes, strict=True)
            ]
        }

    def _how_read(self, layer: str) -> list[Any]:
        """Nothing for a map (B, C, H, W) that stays as it is: all that earlier versions read."""
        how: list[Any] = []
        if self._teacher[layer].kind != "channels_first":
            how += self._teacher[layer]
        if layer in self._modified:
            how.append("before it is modified in place")
        return how

    def forward(self, student: Output, remembered: Tensor, batch: TermBatch) -> Tensor:
        """The student's feature maps and the teacher's attention maps to a scalar."""
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
        ValueError: a layer does not exist, or puts out no map.
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
                f"layer '{layer}' of the {whose} puts out {others.get(layer) or shapes[layer]}, "
                "but attention needs a map (channels, height, width)"
            )
    return {layer: known[layer] for layer in layers}


def pair_by_resolution(
    student: dict[str, tuple[int, int]], teacher: dict[str, tuple[int, int]]
) -> list[tuple[str, str]]:
    """Pair the deepest layers of each resolution that both networks have.

    Args:
        student: layer name to (height, width), from input to output.
        teacher: the same of the teacher.
    """
    # Later layers overwrite earlier ones: what is left at each resolution is the deepest.
    deepest_student = {size: layer for layer, size in student.items()}
    deepest_teacher = {size: layer for layer, size in teacher.items()}
    shared = [size for size in deepest_student if size in deepest_teacher]
    if shared:
        return [(deepest_student[size], deepest_teacher[size]) for size in shared]
    return [(list(student)[-1], list(teacher)[-1])]
