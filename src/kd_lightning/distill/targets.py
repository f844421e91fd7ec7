"""The targets of all terms, from the outputs of the teacher or of every member of an ensemble."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from kd_lightning.distill.ensemble import Ensemble, PerMember, members_of
from kd_lightning.distill.teacher import Teacher
from kd_lightning.losses import Logit, Targets, Term
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
    """

    def __init__(self, teacher: Teacher, terms: Mapping[str, Term]) -> None:
        self.members = members_of(teacher)
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
                found[f"{LOGITS}/{number}"] = (number, Logit())
            for name, term in self._terms.items():
                if isinstance(term, PerMember):
                    found[f"{name}/{number}"] = (number, term.of_member(number))
        return found

    def ask(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the targets for images (B, 3, H, W): (B, ...) by the names of `parts`, or by
        ``name/part`` if they are a dictionary.
        """
        flat: dict[str, Tensor] = {}
        answers = [member.answer(images) for member in self.members]
        for name, (number, term) in self.parts().items():
            value = term.remember(answers[number])
            parts = {"": value} if isinstance(value, Tensor) else value
            flat |= {f"{name}/{part}".rstrip("/"): tensor for part, tensor in parts.items()}
        return flat

    def of_terms(self, flat: Mapping[str, Tensor]) -> dict[str, Targets]:
        """The targets of each term, from the result of `ask` or from the cache."""
        targets: dict[str, Targets] = {}
        for key, value in flat.items():
            name, _, part = key.partition("/")
            if part:
                cast(dict[str, Tensor], targets.setdefault(name, {}))[part] = value
            else:
                targets[name] = value
        if self._ensemble is not None and self._from_logits:
            logits = cast(dict[str, Tensor], targets.pop(LOGITS))
            members = [logits[str(number)] for number in range(len(self.members))]
            combined = Output(self._ensemble.combine(members), {})
            targets |= {name: self._terms[name].remember(combined) for name in self._from_logits}
        return targets
