"""The costs of a student and its teacher that do not depend on the machine."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kd_lightning.distill.recorded import RecordedTeacher
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.models.cost import count_bytes, count_macs

log = logging.getLogger(__name__)


def count_costs(
    student: nn.Module, weights: Path, teachers: Sequence[tuple[nn.Module, int]], image_size: int
) -> dict[str, Any]:
    """Operations and bytes of student and teacher; see `results.FIGURES`.

    A model whose operations cannot be counted causes a warning, not a failed run.

    Args:
        student: the student.
        weights: its weights file.
        teachers: networks of the teacher, or of the members of an ensemble, whose costs are added
            up, each with the size of its images; empty if there is none.
        image_size: height and width of the student's images, in pixels.
    """
    found: dict[str, Any] = {
        "macs": _try("student", lambda: count_macs(student, image_size)),
        "file_bytes": weights.stat().st_size if weights.exists() else None,
    }
    if teachers:
        found["teacher_macs"] = _try(
            "teacher", lambda: sum(count_macs(network, size) for network, size in teachers)
        )
        found["teacher_bytes"] = sum(count_bytes(network) for network, _ in teachers)
    return {name: value for name, value in found.items() if value is not None}


def networks_of(teachers: Sequence[FrozenTeacher], image_size: int) -> list[tuple[nn.Module, int]]:
    """The networks of teachers, each with the size that images of `image_size` are resized to; none
    of a packed teacher, which only has outputs.
    """
    return [
        (teacher.model, teacher.image_size or image_size)
        for teacher in teachers
        if not isinstance(teacher, RecordedTeacher)
    ]


def _try(whose: str, count: Callable[[], int]) -> int | None:
    try:
        return count()
    except Exception as error:  # an operation of the user's own may raise anything
        log.warning("the operations of the %s cannot be counted: %s", whose, error)
        return None
