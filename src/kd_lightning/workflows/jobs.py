"""First phase of a run, prepare: everything is built and checked, except the teacher's weights."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kd_lightning.config.checks import of_one_process
from kd_lightning.config.nodes import Node
from kd_lightning.config.plan import Plan
from kd_lightning.config.resolve import check_devices, resolve
from kd_lightning.config.trust import check_trusted
from kd_lightning.data.checked_views import check_views
from kd_lightning.data.module import ImageDataModule
from kd_lightning.distill.caching import open_caches
from kd_lightning.distill.module import DistillationModule
from kd_lightning.distill.recorded import RecordedTeacher
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.engine.callbacks.users import build_callbacks, check_logged
from kd_lightning.engine.loggers import TENSORBOARD, check_login
from kd_lightning.engine.trainer import try_trainer
from kd_lightning.storage.identity import Contents, source_sha256, target_paths
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.teacher_store import StoredTeacher
from kd_lightning.workflows.assembly import build_data, build_module, try_optimizer
from kd_lightning.workflows.teacher import (
    build_teachers,
    combine_teachers,
    content_sha256,
    count_teachers,
    load_teacher,
)


@dataclass(frozen=True)
class Job:
    """A validated run that is ready to train.

    Only the plan is pickled; other processes rebuild the rest from it.

    Attributes:
        plan: plan of the run.
        data: the data module, set up.
        teachers: the teacher, or the members of an ensemble; empty if the method needs none.
        module: the student and the method's terms.
        teacher_parameters: parameter count of the configured teacher, whether needed or not; None
            if it cannot be built.
        contents: hashes of the files and code that the configuration refers to.
        stored: the teachers from the teacher store, None for checkpoints; empty before training.
    """

    plan: Plan
    data: ImageDataModule
    teachers: tuple[FrozenTeacher, ...]
    module: DistillationModule
    teacher_parameters: int | None
    contents: Contents
    stored: tuple[StoredTeacher | None, ...] = ()

    @property
    def processes(self) -> int:
        """The number of training processes."""
        return self.plan.student.trainer.processes

    @property
    def teacher_facts(self) -> dict[str, Any] | None:
        """What is stored about a single trained teacher; None for checkpoints and ensembles."""
        alone = self.stored[0] if len(self.stored) == 1 else None
        return alone.facts if alone is not None else None

    def with_teachers(self, stored: tuple[StoredTeacher | None, ...]) -> "Job":
        """Load the weights of stored teachers."""
        for teacher, part in zip(self.teachers, stored, strict=bool(stored)):
            if part is not None:
                load_teacher(teacher, part)
        return replace(self, stored=stored)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the plan only."""
        return _rebuild, (self.plan, self.teacher_parameters, self.contents, self.stored)


def _rebuild(
    plan: Plan, parameters: int | None, contents: Contents, stored: tuple[StoredTeacher | None, ...]
) -> Job:
    data = build_data(plan.data.node)
    data.setup()
    teachers = build_teachers(plan)
    module = _build_module(plan, teachers, data)
    return Job(plan, data, teachers, module, parameters, contents).with_teachers(stored)


def _build_module(
    plan: Plan, teachers: Sequence[FrozenTeacher], data: ImageDataModule
) -> DistillationModule:
    teacher = combine_teachers(teachers, plan.average)
    return build_module(plan.student, plan.data, teacher, data.count(), plan.member_terms)


def prepare(config: Node) -> Job:
    """Check and build everything except the teacher's weights and the trainer.

    Detects all invalid input, cheap checks first.

    Raises:
        InputError: the configuration, the data or a file is invalid.
    """
    check_devices(config)
    data = build_data(config["data"])
    plan = resolve(config, data)
    own = {key: tuple(plan.data.node[key]) for key in ("mean", "std")}
    if any(tuple(config["data"][key]) != value for key, value in own.items()):
        data = data.variant(**own)  # the student's normalisation
    teachers = build_teachers(plan)
    parameters = count_teachers(plan, teachers)
    module = _build_module(plan, teachers, data)
    try_optimizer(plan.student.optimizer, plan.student.scheduler)
    for part in plan.teachers:
        try_optimizer(part.training.optimizer, part.training.scheduler, "teacher.")
    callbacks = build_callbacks(plan.student.callbacks)
    check_logged(dict(zip(plan.student.callbacks, callbacks, strict=True)), plan.student.loggers)
    check_login(plan.student.loggers)
    try_trainer(plan.student.trainer)
    data.check_batch_size(module.min_batch_size * plan.student.trainer.processes)
    data.setup()
    check_views(data)
    if isinstance(module.teacher, RecordedTeacher):  # nothing could compute what is missing
        open_caches(module, plan, data, torch.device("cpu"))
    own_code = {part: config.get(part) for part in ("student", "method", "callbacks")}
    contents = Contents(
        images=data.fingerprint(),
        teacher=content_sha256(plan, teachers),
        code=source_sha256(
            own_code,
            plan.student.optimizer,
            plan.student.scheduler,
            plan.data.node.get("augmentation"),
            plan.data.node.get("mixing"),
            # Of the data itself without its files, which are images.
            [{"_target_": target} for target in target_paths(plan.data.node)],
            more=[module.initial_sha256],
        ),
    )
    return Job(plan, data, teachers, module, parameters, contents)


def prepare_again(directory: RunDirectory, trust: Iterable[str] = ()) -> Job:
    """Prepare a run from its folder, for one process, whatever number has trained it.

    Not to be trained: its loggers and Lightning's callbacks are left out.

    Args:
        directory: folder of the run.
        trust: your own packages that the run may import; see `config.trust.check_trusted`.

    Raises:
        InputError: as `prepare`, or the folder is damaged or refers to untrusted code.
    """
    config = {**directory.read_config(), "logger": TENSORBOARD}
    if isinstance(callbacks := config.get("callbacks"), dict):
        config["callbacks"] = {
            name: node  # your own are part of the code that identifies the run
            for name, node in callbacks.items()
            if not (isinstance(node, dict) and str(node.get("_target_")).startswith("lightning."))
        }
    for section, node in config.items():
        if section != "logger":
            check_trusted(node, section, trust)
    trainer, place = of_one_process(config["trainer"]), str(output_dir(config, directory))
    return prepare({**config, "output_dir": place, "trainer": trainer})


def output_dir(config: Node, directory: RunDirectory) -> Path:
    """The `output_dir` of a run, or the folder that it has been moved to."""
    place = Path(config["output_dir"])
    here = directory.path.absolute().parent.parent.parent  # of its runs/SETTING/NAME
    moved = not (place / "teachers").is_dir() and (here / "teachers").is_dir()
    return here if moved else place
