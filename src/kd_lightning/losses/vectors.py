"""Vectors of images, shared by the terms that compare the relations between images."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kd_lightning.losses.pairs import feature_maps
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.term import Context, Reads, Term
from kd_lightning.models.features import LayerShapes, Output
from kd_lightning.models.layouts import Layout
from kd_lightning.models.roles import select
from kd_lightning.models.shapes import Shapes


def unit(vectors: Tensor, epsilon: float | Tensor = 0.0) -> Tensor:
    """Vectors (..., D) divided by their Euclidean length plus `epsilon`.

    The direction of a zero vector is undefined: it remains zero, and its gradient is zero rather
    than NaN or of the order of 1 / epsilon.
    """
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / (length + epsilon).masked_fill(length == 0, torch.inf)


def find_layer(whose: str, shapes: Shapes, name: str, num_classes: int) -> str:
    """The only layer with a name or role.

    Args:
        whose: ``student`` or ``teacher``, for messages.
        shapes: layers of the model.
        name: a name or a role; see `roles.select`.
        num_classes: number of classes.

    Raises:
        ValueError: there is none, or there are several.
    """
    layers = select(name, shapes, num_classes)
    if len(layers) != 1:
        raise ValueError(f"{whose}_layer must be one layer; '{name}' is {', '.join(layers)}")
    return layers[0]


class Vector(NamedTuple):
    """A layer whose output is read as one vector per image.

    Attributes:
        layer: name of the layer.
        size: D, length of the vector.
        layout: axes of the feature map that is averaged over its positions; None: the output is a
            vector.
    """

    layer: str
    size: int
    layout: Layout | None = None

    def of(self, output: Output) -> Tensor:
        """The vectors (B, D) in a model's output, of at least float32."""
        feature = output.features[self.layer]
        if self.layout is None:
            return at_least_float32(feature)
        dtype = torch.promote_types(feature.dtype, torch.float32)
        return self.layout.to_map(feature).mean(dim=(2, 3), dtype=dtype)


def find_vector(whose: str, shapes: Shapes, name: str, num_classes: int) -> Vector:
    """Find a layer that outputs a vector, or a feature map; see `find_layer`.

    Raises:
        ValueError: the layer does not exist, or its output is neither a vector nor a map.
    """
    layer = find_layer(whose, shapes, name, num_classes)
    inputs = shapes.inputs if isinstance(shapes, LayerShapes) else {}
    shape = shapes.get(layer, inputs.get(layer, ()))
    if len(shape) == 1:
        return Vector(layer, shape[0])
    (found,) = feature_maps(whose, shapes, [layer])
    return Vector(layer, found.channels, found.layout)


class VectorTerm(Term):
    """Remembers one vector per image of a layer of the teacher; subclasses add the loss.

    A feature map is averaged over its positions. Subclasses that keep `remember` share cached
    targets.

    Args:
        student_layer: layer of the student: its name or role (see `roles.select`).
        teacher_layer: layer of the teacher.

    Attributes:
        student, teacher: the layers, after `setup`.
    """

    relational: ClassVar[bool] = True

    def __init__(self, student_layer: str = "embedding", teacher_layer: str = "embedding") -> None:
        super().__init__()
        self._names = student_layer, teacher_layer
        self.student = self.teacher = Vector("", 0)

    def setup(self, context: Context) -> Reads:
        """Find the layers.

        Raises:
            ValueError: a layer does not exist, or its output is neither a vector nor a map.
        """
        self.student, self.teacher = (
            find_vector(whose, shapes, name, context.num_classes)
            for whose, shapes, name in zip(
                ("student", "teacher"), (context.student, context.teacher), self._names, strict=True
            )
        )
        return Reads((self.student.layer,), (self.teacher.layer,), teacher_logits=False)

    def remember(self, teacher: Output) -> Tensor:
        """The teacher's vectors (B, D)."""
        return self.teacher.of(teacher)

    def depends_on(self) -> dict[str, Any]:
        """The teacher's layer, and the layout of a map; independent of the loss."""
        layout = self.teacher.layout
        return {"vector": self.teacher.layer, **({"layout": [*layout]} if layout else {})}
