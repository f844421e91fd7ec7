"""What a loss term is: the contract that every method is made of."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from kd_lightning.models.features import Output

Shapes = Mapping[str, tuple[int, ...]]
"""Layer name to the shape of its output without the batch axis."""


class Term(nn.Module):
    """One named part of a method's loss.

    A term that learns from the teacher answers two questions, and keeps them apart: `remember`
    reduces what the teacher said to the one tensor the term needs, which depends on nothing but
    the teacher and the view and can therefore be stored; `forward` compares the student with it.

    Attributes:
        needs_teacher: whether `remember` is called at all.
        needs_logits: whether `remember` reads the teacher's logits.
        student_reads: layers of the student whose feature maps `forward` needs.
        teacher_reads: layers of the teacher whose feature maps `remember` needs.
    """

    needs_teacher: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.student_reads: tuple[str, ...] = ()
        self.teacher_reads: tuple[str, ...] = ()

    def connect(self, student: Shapes, teacher: Shapes) -> None:
        """Learn the layers of both networks, once, before anything is trained.

        Raises:
            ValueError: the term cannot work between the two.
        """

    def remember(self, teacher: Output) -> Tensor:
        """What this term needs of the teacher: a float32 tensor (B, ...)."""
        raise NotImplementedError

    def depends_on(self) -> dict[str, Any] | None:
        """What `remember` depends on besides teacher and view, in plain values, once connected.

        Two terms of one class that say the same share what is stored. None, unless a term says
        better: its own settings are not known to leave `remember` alone, and nothing is stored.
        """
        return None

    def forward(self, student: Output, remembered: Tensor | None, labels: Tensor) -> Tensor:
        """The unweighted loss: a float32 scalar, the mean over the batch."""
        raise NotImplementedError
