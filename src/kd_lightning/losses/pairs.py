"""Pairs of feature maps of student and teacher, shared by the terms that compare maps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kd_lightning.losses.term import Context, Reads
from kd_lightning.models.features import LayerShapes, Output, unknown_layer
from kd_lightning.models.layouts import Layout
from kd_lightning.models.roles import select
from kd_lightning.models.shapes import Shapes


class FeatureMap(NamedTuple):
    """A layer whose output is a feature map.

    Attributes:
        layer: name of the layer.
        layout: its axes.
        channels: number of channels.
    """

    layer: str
    layout: Layout
    channels: int

    def of(self, output: Output) -> Tensor:
        """The map (B, C, H, W) in a model's output."""
        return self.layout.to_map(output.features[self.layer])


class Pair(NamedTuple):
    """Two maps that are compared.

    Attributes:
        student, teacher: the maps.
        size: height and width at which they are compared: the smaller of both.
    """

    student: FeatureMap
    teacher: FeatureMap
    size: tuple[int, int]


class LayerPairs:
    """Selects pairs of layers, by resolution or explicitly.

    By default layers are paired by resolution: at every height and width that occurs in both
    networks, the deepest candidate layers are paired; if there is no common resolution, the deepest
    layers of both. Alternatively, `pairs` gives the pairs, of any channel counts and sizes: the
    larger map is pooled to the smaller.

    The output of a layer may be a map (B, C, H, W) or (B, H, W, C), or tokens (B, N, C) that form a
    grid, with or without class and register tokens; see `find_layouts`.

    Args:
        student_layers: candidate layers of the student, from input to output: names or roles (see
            `roles.select`).
        teacher_layers: candidate layers of the teacher.
        pairs: explicit pairs [[student layer, teacher layer], ...].

    Attributes:
        chosen: the pairs, after `setup`.
    """

    def __init__(
        self,
        student_layers: str | Sequence[str] = "stages",
        teacher_layers: str | Sequence[str] = "stages",
        pairs: Sequence[Sequence[str]] | None = None,
    ) -> None:
        if pairs is not None and (not pairs or any(len(pair) != 2 for pair in pairs)):
            raise ValueError("pairs must be a list of [student layer, teacher layer]")
        self._candidates = (student_layers or "stages", teacher_layers or "stages")
        self._explicit = [(student, teacher) for student, teacher in pairs or ()]
        self._modified: frozenset[str] = frozenset()
        self.chosen: list[Pair] = []

    def setup(self, context: Context) -> Reads:
        """Select the pairs, and the size at which each is compared.

        Raises:
            ValueError: a layer does not exist, or its output is not a map.
        """
        names: Sequence[str | Sequence[str]] = self._candidates
        if self._explicit:
            names = tuple(zip(*self._explicit, strict=True))
        student, teacher = (
            feature_maps(whose, shapes, select(layers, shapes, context.num_classes))
            for whose, shapes, layers in (
                ("student", context.student, names[0]),
                ("teacher", context.teacher, names[1]),
            )
        )
        if self._explicit:
            chosen = list(zip(student, teacher, strict=True))
        else:
            chosen = pair_by_resolution(student, teacher)
        self.chosen = [
            Pair(s, t, (min(s.layout.height, t.layout.height), min(s.layout.width, t.layout.width)))
            for s, t in chosen
        ]
        if isinstance(context.teacher, LayerShapes):
            self._modified = context.teacher.modified
        return self.reads()

    def reads(self) -> Reads:
        """The layers of the chosen pairs."""
        return Reads(
            student=tuple(dict.fromkeys(pair.student.layer for pair in self.chosen)),
            teacher=tuple(dict.fromkeys(pair.teacher.layer for pair in self.chosen)),
            teacher_logits=False,
        )

    def key(self) -> list[Any]:
        """The teacher's layers, and the size to which each is pooled."""
        return [
            [pair.teacher.layer, *pair.size, *self._how_read(pair.teacher)] for pair in self.chosen
        ]

    def _how_read(self, teacher: FeatureMap) -> list[Any]:
        """Empty for an unmodified map (B, C, H, W), to keep caches of earlier versions valid."""
        how: list[Any] = []
        if teacher.layout.kind != "channels_first":
            how += teacher.layout
        if teacher.layer in self._modified:
            how.append("before it is modified in place")
        return how


def feature_maps(whose: str, shapes: Shapes, layers: Sequence[str]) -> list[FeatureMap]:
    """The feature maps of layers. Without `LayerShapes`, (C, H, W) is assumed.

    Args:
        whose: ``student`` or ``teacher``, for messages.
        shapes: layers of the model.
        layers: their names.

    Raises:
        ValueError: a layer does not exist, or its output is not a map.
    """
    known: dict[str, Layout]
    others: dict[str, str] = {}
    if isinstance(shapes, LayerShapes):
        known, others = shapes.layouts, shapes.others
        sizes = {**shapes}
        if any(layer in shapes.inputs for layer in layers):
            known, sizes = known | shapes.input_layouts, sizes | shapes.inputs
    else:
        sizes = dict(shapes)
        maps = {name: shape for name, shape in shapes.items() if len(shape) == 3}
        known = {name: Layout("channels_first", *shape[1:]) for name, shape in maps.items()}
    found = []
    for layer in layers:
        if layer not in (*sizes, *others):
            raise ValueError(f"in the {whose} {unknown_layer(layer, shapes)}")
        if layer not in known:
            raise ValueError(
                f"layer '{layer}' of the {whose} outputs {others.get(layer) or sizes[layer]}, "
                "but a map (channels, height, width) is needed"
            )
        found.append(FeatureMap(layer, known[layer], known[layer].channels(sizes[layer])))
    return found


def pair_by_resolution(
    student: Sequence[FeatureMap], teacher: Sequence[FeatureMap]
) -> list[tuple[FeatureMap, FeatureMap]]:
    """Pair the deepest layers at each common resolution.

    Args:
        student: feature maps, from input to output.
        teacher: the same of the teacher.
    """
    # Later layers overwrite earlier ones, so the deepest remains at each resolution.
    deepest_student = {part.layout.size: part for part in student}
    deepest_teacher = {part.layout.size: part for part in teacher}
    shared = [size for size in deepest_student if size in deepest_teacher]
    if shared:
        return [(deepest_student[size], deepest_teacher[size]) for size in shared]
    return [(student[-1], teacher[-1])]
