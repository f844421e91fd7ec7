"""Build, find or train the teachers of a run."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kd_lightning.config.nodes import Node, build
from kd_lightning.config.packed import read_packed
from kd_lightning.config.plan import DataPlan, Plan, TeacherPlan
from kd_lightning.data.checked_views import check_views
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.views import Augmentation, Views
from kd_lightning.distill.divergence import first_not_finite
from kd_lightning.distill.ensemble import Ensemble
from kd_lightning.distill.recorded import RecordedTeacher
from kd_lightning.distill.teacher import FrozenTeacher, Teacher
from kd_lightning.engine import fitting
from kd_lightning.engine.callbacks.stopping import stoppable
from kd_lightning.engine.loggers import closing
from kd_lightning.engine.trainer import build_trainer
from kd_lightning.errors import InputError
from kd_lightning.models import count_parameters
from kd_lightning.models.preparing import ResizeInput, materialize
from kd_lightning.storage.identity import file_sha256, source_sha256
from kd_lightning.storage.provenance import versions
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.teacher_store import StoredTeacher, TeacherStore, teacher_key
from kd_lightning.storage.weights import load_weights
from kd_lightning.workflows.assembly import build_module, build_teacher

log = logging.getLogger(__name__)


def build_teachers(plan: Plan) -> tuple[FrozenTeacher, ...]:
    """The networks of the teacher or of an ensemble's members; loads user-provided checkpoints.

    Raises:
        InputError: a network cannot be built, or a checkpoint is damaged or not finite.
    """
    teachers = tuple(build_teacher(part, plan.data) for part in plan.teachers)
    for teacher, part in zip(teachers, plan.teachers, strict=True):
        if (weights := part.weights or part.training.initial) is not None:
            check_weights(teacher, weights.origin)
    return teachers


def combine_teachers(teachers: Sequence[FrozenTeacher], average: str) -> Teacher | None:
    """A single teacher, an ensemble, or None.

    Raises:
        InputError: a member of an ensemble is a packed teacher.
    """
    if len(teachers) > 1:
        if any(isinstance(teacher, RecordedTeacher) for teacher in teachers):
            raise InputError("teacher.members: a packed teacher cannot be in an ensemble")
        return Ensemble(teachers, average)
    return teachers[0] if teachers else None


def find_teachers(
    plan: Plan, data: ImageDataModule, teachers: Sequence[FrozenTeacher]
) -> tuple[StoredTeacher | None, ...]:
    """Get the teachers of a run from the store, training them if necessary; None for those whose
    checkpoint or pretrained weights are used as they are, or that follow the student.

    Args:
        plan: plan of the run.
        data: the data module, set up.
        teachers: the networks, with the weights that they start from.
    """
    return tuple(
        _find(part, plan, data, teacher.initial_sha256)
        for part, teacher in zip(plan.teachers, teachers, strict=True)
    )


def _find(
    teacher: TeacherPlan, plan: Plan, data: ImageDataModule, initial: str
) -> StoredTeacher | None:
    if teacher.weights is not None or teacher.decay is not None:
        return None
    if teacher.outputs is not None:
        packed = read_packed(teacher.outputs)
        digest = file_sha256(packed.file)
        return StoredTeacher(packed.file, digest, packed.facts, digest)
    return TeacherStore(plan.output_dir / "teachers").obtain(
        teacher.name,
        teacher_key(teacher, data.fingerprint(), initial),
        lambda folder: train_teacher(teacher, plan, data, folder),
    )


def content_sha256(plan: Plan, teachers: Sequence[FrozenTeacher]) -> str | None:
    """Hash of the teachers' user code and weights; None if there are neither."""
    parts = []
    for part, teacher in zip(plan.teachers, teachers, strict=True):
        code = source_sha256(*(part.own_nodes if part.weights is None else [part.model]))
        if not teacher.initial_sha256:
            parts.append(code)
        else:
            text = f"{teacher.initial_sha256} {code}"
            parts.append(hashlib.sha256(text.encode()).hexdigest())
    if len(parts) < 2:
        return parts[0] if parts else None
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest() if any(parts) else None


def count_teachers(plan: Plan, teachers: Sequence[FrozenTeacher]) -> int | None:
    """Parameter count of the configured teachers, whether or not the method needs them."""
    if teachers:
        return sum(teacher.parameters for teacher in teachers)
    counts = [_count(model, plan.data) for model in plan.teacher_models]
    return None if None in counts else sum(filter(None, counts))


def _count(model: Node, data: DataPlan) -> int | None:
    try:
        with torch.device("meta"):  # without allocating memory
            return count_parameters(build(model, "teacher.model"))
    except Exception:  # its constructor needs actual values
        pass
    try:
        network = build(model, "teacher.model")
        materialize(network, data.image_size, "teacher.model")
        return count_parameters(network)
    except Exception as error:  # a missing package or download must not prevent the run
        log.warning("the teacher's parameters cannot be counted: %s", error)
        return None


def _views(data: ImageDataModule, plan: TeacherPlan) -> Views:
    """The teacher's training views, independent of the student's."""
    if plan.augmentation is not None:
        return build(plan.augmentation, "teacher.augmentation")
    return Augmentation(data.padding, data.flip, plan.cutout, seed=plan.training.seed)


def load_teacher(teacher: FrozenTeacher, stored: StoredTeacher) -> None:
    """Load a stored teacher's weights; a packed teacher has none."""
    if isinstance(teacher, RecordedTeacher):
        return
    load_weights(teacher.model, stored.weights)
    check_weights(teacher, str(stored.weights))


def check_weights(teacher: FrozenTeacher, origin: str) -> None:
    """Check that a teacher's weights are finite.

    Args:
        teacher: the teacher, with its weights loaded.
        origin: name of the weights' file, for the message.

    Raises:
        InputError: a weight is NaN or infinite.
    """
    name = first_not_finite(teacher.model.named_parameters())
    if name is not None:
        raise InputError(
            f"the teacher's weights are not finite ('{name}' in {origin}): "
            "its training diverged, or the file is damaged"
        )


def train_teacher(
    plan: TeacherPlan, run: Plan, data: ImageDataModule, folder: Path
) -> dict[str, Any]:
    """Train the teacher on the labels and write `teacher.safetensors`.

    Args:
        plan: plan of the teacher.
        run: plan of the run.
        data: the data module, set up.
        folder: empty, or with an interrupted training of the same teacher, which is resumed.

    Returns:
        Accuracies, parameter count and training time.
    """
    training, directory = plan.training, RunDirectory(folder)
    data = data.variant(
        seed=training.seed,
        views=None,
        mean=plan.normalization.mean,
        std=plan.normalization.std,
        augmentation=_views(data, plan),
        mixing=build(plan.mixing, "teacher.mixing") if plan.mixing is not None else None,
    )
    check_views(data)
    size = plan.image_size or run.data.image_size
    module = build_module(training, replace(run.data, image_size=size))
    if plan.image_size is not None:
        module.student.register_forward_pre_hook(ResizeInput(size))
    directory.write_config(run.config)
    resume = directory.checkpoint()
    name = f"teacher {plan.name}"
    trainer = build_trainer(
        training.trainer, folder, name, resume, (), training.pictures, training.loggers
    )
    try:
        with closing(trainer.loggers), stoppable():
            results = fitting.fit(trainer, module, data, directory, "teacher", resume)
            results |= fitting.test(trainer, module, data, directory, results, update_bn=False)
    finally:
        data.forget()  # this variant's, on the training device
    return {"parameters": count_parameters(module.student), **results, **versions()}
