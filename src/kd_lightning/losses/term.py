"""The interface of loss terms."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from kd_lightning.models.features import LayerShapes, Output, unknown_layer
from kd_lightning.models.roles import select
from kd_lightning.models.shapes import Shapes
from kd_lightning.models.trial import INPUT

Targets = Tensor | dict[str, Tensor]
"""A term's targets, computed from the teacher's output: (B, ...), or several of these by name."""


@dataclass(frozen=True)
class Context:
    """Information available to a term before training.

    Attributes:
        student: layers of the student, in order of execution.
        teacher: layers of the teacher; empty if there is none.
        num_classes: number of classes.
        train_size: number of training and validation images; upper bound of a batch's indices.
    """

    student: Shapes
    teacher: Shapes = field(default_factory=dict)
    num_classes: int = 10
    train_size: int = 0


class Reads(NamedTuple):
    """The features that a term reads from both networks.

    A layer is a name, ``"name:input"`` for the input of a layer, or the role of a single layer (see
    `roles.select`), unless the network has a layer of that name. It is the key of the feature.

    Attributes:
        student: layers whose output `forward` needs.
        teacher: layers whose output `remember` needs.
        teacher_logits: whether `remember` reads the teacher's logits. If no term does, the
            teacher's forward pass ends at the last layer that is read.
    """

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    teacher_logits: bool = True

    def of_student(self, context: Context) -> dict[str, str]:
        """The student's layer for each name or role.

        Raises:
            ValueError: a layer does not exist, or a role is not a single layer.
        """
        return _locate("student", self.student, context.student, context.num_classes)

    def of_teacher(self, context: Context) -> dict[str, str]:
        """The teacher's layer for each name or role; see `of_student`."""
        return _locate("teacher", self.teacher, context.teacher, context.num_classes)


def _locate(whose: str, names: tuple[str, ...], shapes: Shapes, num_classes: int) -> dict[str, str]:
    known = {*shapes}
    if isinstance(shapes, LayerShapes):
        known |= {*shapes.others, *shapes.inputs}
    known.discard("")  # the model itself
    found = {}
    for name in names:
        layers = (name,) if name in known else select(name, shapes, num_classes)
        if len(layers) != 1:
            raise ValueError(f"'{name}' of the {whose} is {', '.join(layers)}: name one layer")
        if known.isdisjoint({layers[0], layers[0].removesuffix(INPUT)}):
            raise ValueError(f"in the {whose} {unknown_layer(name, shapes)}")
        found[name] = layers[0]
    return found


@dataclass(frozen=True)
class TermBatch:
    """The part of a training batch that is passed to terms.

    Attributes:
        labels: (B,), int64, on the device of the logits.
        index: image indices (B,), int64, on the CPU.
        view: view numbers (B,), int64, on the CPU.
        progress: completed fraction of the training, in [0, 1].
        partner_labels: labels of the images that are mixed in (B,), int64; None: no image is mixed.
        ratio: share of `labels` in a mixed image (B,), float32, in [0, 1]; None: no image is mixed.
    """

    labels: Tensor
    index: Tensor
    view: Tensor
    progress: float = 0.0
    partner_labels: Tensor | None = None
    ratio: Tensor | None = None


class Term(nn.Module):
    """Base class of loss terms.

    A term with a teacher consists of two parts: `remember` reduces the teacher's output to the
    term's targets, which depend only on the teacher and the view and can therefore be cached;
    `forward` computes the loss of the student with respect to these targets.

    Parameters of a term (e.g. a projector) are trained and resumed with the student, but are not
    part of it.

    Attributes:
        needs_teacher: whether the term uses `remember`.
        relational: whether the loss depends on relations between the images of a batch. Such a term
            receives the gathered batches of all processes.
    """

    needs_teacher: ClassVar[bool] = True
    relational: ClassVar[bool] = False

    def setup(self, context: Context) -> Reads:
        """Called once before training; create parameters here.

        Raises:
            ValueError: the term is not applicable to these networks.
        """
        return Reads()

    def begin(self) -> None:
        """Called when the training begins: unlike in `setup`, the teacher's weights are loaded."""

    def remember(self, teacher: Output) -> Targets:
        """Compute the targets from the teacher's output: float32 (B, ...), or a dictionary."""
        raise NotImplementedError

    def depends_on(self) -> dict[str, Any] | None:
        """Cache key: what `remember` depends on besides teacher and view, as plain values.

        Called after `setup`. Terms of one class with equal keys share cached targets. If `remember`
        returns a dictionary, the item ``parts`` may hold the key of each target by name; then
        single targets are shared. None (the default) disables the cache.
        """
        return None

    def forward(self, student: Output, remembered: Any, batch: TermBatch) -> Tensor:
        """The unweighted loss: a float32 scalar, the mean over the batch.

        Args:
            student: logits (B, C) and the layers requested by `setup`.
            remembered: targets from `remember` for this batch; None without a teacher.
            batch: labels, indices and view numbers.
        """
        raise NotImplementedError
