"""Construction of the objects of a run from its plan: data, teacher, module."""

from collections.abc import Sequence

import torch
from lightning.pytorch import seed_everything

from kd_lightning.config.nodes import Node, build, build_partial, check_node
from kd_lightning.config.plan import DataPlan, TeacherPlan, TrainingPlan
from kd_lightning.data.module import ImageDataModule
from kd_lightning.distill.mean_teacher import MeanTeacher
from kd_lightning.distill.module import DistillationModule
from kd_lightning.distill.recorded import RecordedNetwork, RecordedTeacher
from kd_lightning.distill.schedulers import build_schedule
from kd_lightning.distill.teacher import FrozenTeacher, Teacher
from kd_lightning.models.preparing import materialize
from kd_lightning.workflows.initial import load_initial


def build_data(node: Node) -> ImageDataModule:
    """Build the data module; images are not loaded yet, but the classes are known."""
    check_node(node, "data")
    return build(node, "data")


def build_teacher(plan: TeacherPlan, data: DataPlan) -> FrozenTeacher:
    """Build the teacher's network; loads the weights that it uses or starts from, if any.

    A packed teacher, whose network is not available, reads its recorded outputs instead.
    """
    model = build(plan.model, "teacher.model")
    if isinstance(model, RecordedNetwork):
        return RecordedTeacher(model, data.normalization)
    materialize(model, plan.image_size or data.image_size, "teacher.model")
    if plan.decay is not None:
        return MeanTeacher(model, data.normalization, plan.decay)
    initial = ""
    if plan.weights is not None:
        initial = load_initial(model, plan.model, plan.weights)
    elif plan.training.initial is not None:
        initial = load_initial(model, plan.model, plan.training.initial, data.num_classes)
    teacher = FrozenTeacher(model, plan.normalization, data.normalization, plan.image_size)
    teacher.initial_sha256 = initial
    return teacher


def build_module(
    plan: TrainingPlan,
    data: DataPlan,
    teacher: Teacher | None = None,
    train_size: int = 0,
    member_terms: Sequence[dict[str, Node]] = (),
) -> DistillationModule:
    """Build the module of a network, initialised from its seed or weights, and its loss terms."""
    seed_everything(plan.seed, verbose=False)
    module = DistillationModule(
        student=plan.model,
        terms=plan.terms,
        optimizer=plan.optimizer,
        scheduler=plan.scheduler,
        num_classes=data.num_classes,
        image_size=data.image_size,
        channels_last=plan.trainer.channels_last,
        train_size=train_size,
        teacher=teacher,
        member_terms=member_terms,
    )
    if plan.initial is not None:
        start = plan.model, plan.initial, data.num_classes
        module.initial_sha256 = load_initial(module.student, *start)
    return module


def try_optimizer(optimizer: Node, scheduler: Node | None, role: str = "") -> None:
    """Build optimizer and scheduler for a dummy parameter, to detect invalid arguments early."""
    number = torch.nn.Parameter(torch.zeros(1))
    trial = build_partial(optimizer, f"{role}optimizer")([number])
    if scheduler is not None:
        build_schedule(scheduler, trial, 100, f"{role}scheduler")
