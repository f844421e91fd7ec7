"""The targets of all terms, from the outputs of the teacher or of every member of an ensemble."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from kd_lightning.distill.ensemble import Ensemble, PerMember, members_of
from kd_lightning.distill.teacher import Teacher
from kd_lightning.distill.top_k import reduce, restore
from kd_lightning.losses import LogitTerm, Targets, Term
from kd_lightning.losses.logit_term import remembers_logits
from kd_lightning.models.features import Output

LOGITS = ""
"""Name of the members' logits among the targets, from which the ensemble's logits are computed."""


class TeacherTargets:
    """Computes the targets of the terms that need the teacher.

    What is cached are outputs of single members: every ensemble with the same member shares them.

    Args:
        teacher: a teacher or an ensemble.
        terms: the terms that need it, set up; those that read features are `PerMember` for an
            ensemble.
        classes: number of classes.
        layers: for each member the layers that the terms read, by name or role; none by default.

    Attributes:
        top_k: number of logits that are kept; see `top_k`. None: all.
    """

    def __init__(
        self,
        teacher: Teacher,
        terms: Mapping[str, Term],
        classes: int,
        layers: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.classes = classes
        self.top_k: int | None = None
        self.members = members_of(teacher)
        self._layers = layers or [{}] * len(self.members)
        self._ensemble = teacher if isinstance(teacher, Ensemble) else None
        self._terms = terms
        self._from_logits = [] if self._ensemble is None else [
            name for name, term in terms.items() if not isinstance(term, PerMember)
        ]  # fmt: skip

    def parts(self) -> dict[str, tuple[int, Term]]:
        """Name of each cacheable target, without its parts, to the member and the term."""
        if self._ensemble is None:
            return {name: (0, term) for name, term in self._terms.items()}
        found: dict[str, tuple[int, Term]] = {}
        for number in range(len(self.members)):
            if self._from_logits:
                found[f"{LOGITS}/{number}"] = (number, LogitTerm())
            for name, term in self._terms.items():
                if isinstance(term, PerMember):
                    found[f"{name}/{number}"] = (number, term.of_member(number))
        return found

    def is_reduced(self, name: str) -> bool:
        """Whether only the largest logits are kept of a target, one of `parts`."""
        if self.top_k is None:
            return False
        if self._ensemble is not None and name.partition("/")[0] == LOGITS:
            return all(_accepts_top_k(self._terms[reader]) for reader in self._from_logits)
        part = self.parts().get(name)
        return part is not None and _accepts_top_k(part[1])

    def ask(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the targets for images (B, 3, H, W): (B, ...) by the names of `parts`, or by
        ``name/part`` if they are a dictionary.
        """
        flat: dict[str, Tensor] = {}
        answers = [
            member.answer(images).named(layers)
            for member, layers in zip(self.members, self._layers, strict=True)
        ]
        for name, (number, term) in self.parts().items():
            value = term.remember(answers[number])
            if self.top_k is not None and self.is_reduced(name):
                value = reduce(cast(Tensor, value), self.top_k)
            parts = {"": value} if isinstance(value, Tensor) else value
            flat |= {f"{name}/{part}".rstrip("/"): tensor for part, tensor in parts.items()}
        return flat

    def of_terms(self, flat: Mapping[str, Tensor]) -> dict[str, Targets]:
        """The targets of each term, from the result of `ask` or from the cache."""
        targets: dict[str, Targets] = {}
        for key, value in flat.items():
            name, _, part = key.partition("/")
            if self._ensemble is None and self.is_reduced(key):
                targets[name] = self._restored(value, self._terms[name])
            elif part:
                cast(dict[str, Tensor], targets.setdefault(name, {}))[part] = value
            else:
                targets[name] = value
        if self._ensemble is not None and self._from_logits:
            logits = cast(dict[str, Tensor], targets.pop(LOGITS))
            reduced = self.is_reduced(f"{LOGITS}/0")
            for name in self._from_logits:
                term = self._terms[name]
                members = [
                    self._restored(rows, term) if reduced else rows
                    for rows in (logits[str(number)] for number in range(len(self.members)))
                ]
                targets[name] = term.remember(Output(self._ensemble.combine(members), {}))
        return targets

    def _restored(self, rows: Tensor, term: Term) -> Tensor:
        """Dense logits (B, C) for a term, from reduced rows."""
        return restore(rows, self.classes, float(getattr(term, "temperature", 1.0)))


def _accepts_top_k(term: Term) -> bool:
    """Whether a term needs only the largest of the teacher's logits."""
    return isinstance(term, LogitTerm) and term.accepts_top_k and remembers_logits(term)
