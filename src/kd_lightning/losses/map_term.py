"""The base class of terms that compare feature maps with the teacher's own."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kd_lightning.losses.pairs import LayerPairs
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.term import Context, Reads, Targets, Term
from kd_lightning.models.features import Output
from kd_lightning.models.pooling import pool


class MapTerm(Term):
    """Remembers the teacher's maps of pairs of layers; subclasses add the loss.

    Subclasses that keep `remember` share cached targets: a map that several of them read at the
    same size is stored once.

    Args:
        student_layers: layers of the student; see `LayerPairs`.
        teacher_layers: layers of the teacher.
        pairs: pairs of layers, instead of both.
    """

    def __init__(
        self,
        student_layers: str | Sequence[str] = "stages",
        teacher_layers: str | Sequence[str] = "stages",
        pairs: Sequence[Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        self.layers = LayerPairs(student_layers, teacher_layers, pairs)

    def setup(self, context: Context) -> Reads:
        """Select the pairs.

        Raises:
            ValueError: a layer does not exist, or its output is not a map.
        """
        return self.layers.setup(context)

    def remember(self, teacher: Output) -> Targets:
        """The teacher's map of each pair, by the pair's number: (B, C, h, w)."""
        return {
            str(number): pool(at_least_float32(pair.teacher.of(teacher)), pair.size)
            for number, pair in enumerate(self.layers.chosen)
        }

    def depends_on(self) -> dict[str, Any]:
        """For each map, the teacher's layer and the size."""
        return {"parts": {str(number): key for number, key in enumerate(self.layers.key())}}

    def matched(
        self, student: Output, remembered: dict[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each pair, the student's map pooled to the pair's size, and the teacher's."""
        return [
            (pool(pair.student.of(student), pair.size), remembered[str(number)])
            for number, pair in enumerate(self.layers.chosen)
        ]
