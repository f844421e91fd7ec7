"""Ensembles: several teachers as one."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import ModuleList

from kd_lightning.distill.teacher import Teacher
from kd_lightning.losses import Context, Reads, Term, TermBatch
from kd_lightning.models.features import LayerShapes, Output

AVERAGES = ("probabilities", "logits")


class Ensemble:
    """Teachers whose predictions are averaged; satisfies `Teacher`.

    Features are read of each member; see `PerMember`.

    Args:
        members: at least one.
        average: what is averaged: ``probabilities``, whose logarithm serves as logits (arithmetic
            mean), or ``logits`` (geometric mean of the probabilities); Hinton et al. (2015),
            section 1.
    """

    def __init__(self, members: Sequence[Teacher], average: str = "probabilities") -> None:
        if average not in AVERAGES:
            raise ValueError(f"average must be one of {', '.join(AVERAGES)}, not {average}")
        self.members = tuple(members)
        self.average = average

    def combine(self, logits: Sequence[Tensor]) -> Tensor:
        """The ensemble's logits (B, C), float32, from those of its members, (B, C) each."""
        together = torch.stack([part.float() for part in logits])
        if self.average == "logits":
            return together.mean(dim=0)
        # Created on the device: a Python number would be copied synchronously.
        count = together.new_full((), len(logits)).log()
        return together.log_softmax(dim=2).logsumexp(dim=0) - count

    def shapes(self, image_size: int) -> LayerShapes:
        """Layer shapes of the first member."""
        return self.members[0].shapes(image_size)

    def read(
        self, layers: Collection[str], logits: bool = True, num_classes: int | None = None
    ) -> None:
        """Select the outputs of every member."""
        for member in self.members:
            member.read(layers, logits, num_classes)

    def prepare(
        self, device: torch.device, memory_format: torch.memory_format, dtype: torch.dtype | None
    ) -> None:
        """Set device and precision of every member."""
        for member in self.members:
            member.prepare(device, memory_format, dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the averaged logits (B, C)."""
        return self.combine([member(images) for member in self.members])

    def answer(self, images: Tensor) -> Output:
        """Images (B, 3, H, W) to the averaged logits, without features."""
        return Output(self.combine([member.answer(images).logits for member in self.members]), {})

    def fingerprint(self) -> str | None:
        """SHA-256 of the members' fingerprints; None if one has none."""
        parts = [member.fingerprint() for member in self.members]
        if any(part is None for part in parts):
            return None
        return hashlib.sha256(" ".join([self.average, *map(str, parts)]).encode()).hexdigest()

    def why_not_stored(self, images: Tensor) -> str:
        """The first member's reason why outputs must not be cached; empty if none."""
        return next(filter(None, (member.why_not_stored(images) for member in self.members)), "")

    @property
    def parameters(self) -> int:
        """Number of parameters of all members."""
        return sum(member.parameters for member in self.members)


def members_of(teacher: Teacher | None) -> tuple[Teacher, ...]:
    """The members of an ensemble; otherwise the teacher itself, or none."""
    if teacher is None:
        return ()
    return teacher.members if isinstance(teacher, Ensemble) else (teacher,)


class PerMember(Term):
    """A term that reads features, for an ensemble: the mean of its losses for each member.

    Each member has a copy of the term, since layers and parameters depend on the member.

    Args:
        copies: the term of each member.
    """

    def __init__(self, copies: Sequence[Term]) -> None:
        super().__init__()
        self.copies = ModuleList(copies)
        self.relational = copies[0].relational  # type: ignore[misc]

    def of_member(self, number: int) -> Term:
        """The term of a member."""
        term = self.copies[number]
        assert isinstance(term, Term)
        return term

    def setup_members(self, contexts: Sequence[Context]) -> list[Reads]:
        """Set up the term of each member; what each reads."""
        return [self.of_member(number).setup(context) for number, context in enumerate(contexts)]

    def begin(self) -> None:
        """Begin with every copy."""
        for number in range(len(self.copies)):
            self.of_member(number).begin()

    def forward(self, student: Output, remembered: Mapping[str, Any], batch: TermBatch) -> Tensor:
        """The mean of the members' losses.

        Args:
            student: as for the term.
            remembered: the term's targets for each member, ``<number>`` or ``<number>/<part>``.
            batch: as for the term.
        """
        losses = []
        for number in range(len(self.copies)):
            key = str(number)
            parts = {
                name.partition("/")[2]: value
                for name, value in remembered.items()
                if name.partition("/")[0] == key
            }
            targets = parts.get("", parts)
            losses.append(self.of_member(number)(student, targets, batch))
        return torch.stack(losses).mean()
