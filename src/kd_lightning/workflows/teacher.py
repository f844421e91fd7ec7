"""Find or train the teacher of a run."""

from pathlib import Path
from typing import Any

from kd_lightning.config.nodes import build
from kd_lightning.config.plan import Plan, TeacherPlan
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.views import Augmentation, Views
from kd_lightning.distill.divergence import first_not_finite
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.engine import fitting
from kd_lightning.engine.trainer import build_trainer
from kd_lightning.errors import InputError
from kd_lightning.models import count_parameters
from kd_lightning.storage.provenance import versions
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.teacher_store import StoredTeacher, TeacherStore, teacher_key
from kd_lightning.storage.weights import load_weights
from kd_lightning.workflows.assembly import build_module


def find_teacher(plan: Plan, data: ImageDataModule) -> StoredTeacher | None:
    """Get the teacher of a run from the store, training it if necessary; None if the method has no
    teacher or the user provides a checkpoint.

    Args:
        plan: plan of the run.
        data: the data module, set up.
    """
    teacher = plan.teacher
    if teacher is None or teacher.checkpoint is not None:
        return None
    return TeacherStore(plan.output_dir / "teachers").obtain(
        teacher.name,
        teacher_key(teacher, data.fingerprint()),
        lambda folder: train_teacher(teacher, plan, data, folder),
    )


def _views(data: ImageDataModule, plan: TeacherPlan) -> Views:
    """The teacher's training views, independent of the student's."""
    if plan.augmentation is not None:
        return build(plan.augmentation, "teacher.augmentation")
    return Augmentation(data.padding, data.flip, plan.cutout, seed=plan.training.seed)


def load_teacher(teacher: FrozenTeacher, stored: StoredTeacher) -> None:
    """Load a stored teacher's weights."""
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
    module = build_module(training, run.data)
    directory.write_config(run.config)
    resume = directory.checkpoint()
    name = f"teacher {plan.name}"
    trainer = build_trainer(training.trainer, folder, name, resume, pictures=training.pictures)
    results = fitting.fit(trainer, module, data, directory, "teacher", resume)
    results |= fitting.test(trainer, module, data, directory, results, update_bn=False)
    return {"parameters": count_parameters(module.student), **results, **versions()}
