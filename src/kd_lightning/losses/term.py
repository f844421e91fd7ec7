"""What a loss term is: the contract that every method is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from kd_lightning.models.features import Output

Shapes = Mapping[str, tuple[int, ...]]
"""Layer name to the shape of its output without the batch axis; see `models.LayerShapes`."""

Targets = Tensor | dict[str, Tensor]
"""What a term keeps of the teacher's output: (B, ...), or several of these by name."""


@dataclass(frozen=True)
class Context:
    """What a term can know before training.

    Attributes:
        student: layers of the student, in order of execution.
        teacher: layers of the teacher; empty if there is none.
        num_classes: number of classes.
        train_size: number of training and validation images; the indices of a batch are below it.
    """

    student: Shapes
    teacher: Shapes = field(default_factory=dict)
    num_classes: int = 10
    train_size: int = 0


class Reads(NamedTuple):
    """What a term reads of both networks.

    Attributes:
        student: layers whose output `forward` needs; ``"layer:input"`` is what a layer is given.
        teacher: layers whose output `remember` needs.
        teacher_logits: whether `remember` reads the teacher's logits. If no term does, the teacher
            computes nothing after the last layer that is read.
    """

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    teacher_logits: bool = True


@dataclass(frozen=True)
class TermBatch:
    """A training batch as terms see it.

    Attributes:
        labels: (B,), int64, where the logits are.
        index: which images (B,), int64, on the CPU.
        view: which view of each (B,), int64, on the CPU.
        progress: share of the training that is done, in [0, 1].
    """

    labels: Tensor
    index: Tensor
    view: Tensor
    progress: float = 0.0


class Term(nn.Module):
    """One named part of a method's loss.

    A term that learns from the teacher answers two questions, and keeps them apart: `remember`
    reduces the teacher's output to what the term needs, which depends on nothing but the teacher
    and the view and can therefore be stored; `forward` compares the student with it.

    Parameters of a term (a projector, say) are trained and resumed with the student, but are no
    part of it.

    Attributes:
        needs_teacher: whether `remember` is called at all.
        relational: whether the value depends on which images share a batch. Such a term is given
            the batches of all processes that train together, as one.
    """

    needs_teacher: ClassVar[bool] = True
    relational: ClassVar[bool] = False

    def setup(self, context: Context) -> Reads:
        """Learn about both networks, once, before training; make parameters here.

        Raises:
            ValueError: the term cannot work between the two.
        """
        return Reads()

    def remember(self, teacher: Output) -> Targets:
        """What this term needs of the teacher's output: float32 (B, ...), or a dictionary."""
        raise NotImplementedError

    def depends_on(self) -> dict[str, Any] | None:
        """What `remember` depends on besides teacher and view, in plain values, after `setup`.

        Two terms of one class that say the same share what is stored. None (the default): it is
        not known, and nothing is stored.
        """
        return None

    def forward(self, student: Output, remembered: Any, batch: TermBatch) -> Tensor:
        """The unweighted loss: a float32 scalar, the mean over the batch.

        Args:
            student: logits (B, C) and the layers that `setup` asked for.
            remembered: what `remember` returned for this batch; None without a teacher.
            batch: labels and more.
        """
        raise NotImplementedError
