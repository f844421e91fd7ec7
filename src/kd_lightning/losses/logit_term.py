"""The base class of terms that compare logits."""

from typing import Any

from torch import Tensor

from kd_lightning.losses.term import Term
from kd_lightning.models.features import Output


class LogitTerm(Term):
    """Base class of terms whose targets are the teacher's logits, unchanged.

    Whatever is done with the logits belongs into `forward`, so that all of these terms share one
    cache.

    Attributes:
        accepts_top_k: whether the k largest logits and the total probability of the rest are enough
            for the loss; see `distill.top_k`. The restored logits have the right class
            probabilities at the term's `temperature` (1 if it has none), but within the rest
            neither order nor variance.
    """

    accepts_top_k: bool = False

    def remember(self, teacher: Output) -> Tensor:
        """The teacher's logits (B, C), float32."""
        return teacher.logits.float()

    def depends_on(self) -> dict[str, Any]:
        """Empty: everything else, e.g. a temperature, is applied in `forward`."""
        return {}


def remembers_logits(term: Term) -> bool:
    """Whether a term's targets are the teacher's logits: it does not override `LogitTerm`'s."""
    return (
        isinstance(term, LogitTerm)
        and type(term).remember is LogitTerm.remember
        and type(term).depends_on is LogitTerm.depends_on
    )
