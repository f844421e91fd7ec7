"""A complete run in three phases: prepare, launch, record."""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from kd_lightning.config.checks import check_sections
from kd_lightning.config.nodes import Node
from kd_lightning.config.plan import Plan
from kd_lightning.config.resolve import check_devices, resolve
from kd_lightning.data.module import ImageDataModule
from kd_lightning.distill.caching import open_caches
from kd_lightning.distill.mean_teacher import MeanTeacher
from kd_lightning.distill.module import DistillationModule
from kd_lightning.distill.recorded import RecordedTeacher
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.engine import fitting
from kd_lightning.engine.callbacks.averaging import AverageWeights
from kd_lightning.engine.callbacks.following import FollowStudent
from kd_lightning.engine.callbacks.users import build_callbacks
from kd_lightning.engine.fitting import metric
from kd_lightning.engine.launch import launch, launched, rank
from kd_lightning.engine.trainer import build_trainer, try_trainer
from kd_lightning.errors import InputError, Stopped
from kd_lightning.models import count_parameters
from kd_lightning.reports.hparams import log_hparams
from kd_lightning.storage.identity import (
    Contents,
    finished,
    finished_elsewhere,
    source_sha256,
    stamps,
    targets,
    unchanged,
)
from kd_lightning.storage.provenance import device_name, versions
from kd_lightning.storage.run_directory import Checkpoint, RunDirectory
from kd_lightning.storage.teacher_store import StoredTeacher
from kd_lightning.workflows.assembly import (
    build_data,
    build_module,
    try_optimizer,
)
from kd_lightning.workflows.teacher import (
    build_teachers,
    content_sha256,
    count_teachers,
    find_teachers,
    load_teacher,
    together,
)

log = logging.getLogger(__name__)


def run(
    config: Node,
    run_dir: str | Path,
    wait: bool = True,
    callbacks: Sequence[Callback] = (),
    test: bool = True,
) -> dict[str, Any]:
    """Train and test one student; return the contents of `metrics.json`.

    Under a launcher, ranks other than 0 return {}.

    A finished run is not repeated, an interrupted one is resumed. If the images, the teacher or
    user code have changed since, the earlier run is moved to `output_dir/superseded`.

    Args:
        config: the complete configuration, as plain dictionaries (see `config.complete.plain`).
        run_dir: the folder of this run.
        wait: whether to wait for another process that executes the same run.
        callbacks: additional Lightning callbacks for the student's training.
        test: whether to use the test images; a hyper-parameter search must not.

    Raises:
        InputError: the configuration, the data or a file is invalid; raised before any training
            and before anything is written.
        RunError: the training failed.
    """
    check_sections(config)
    directory = RunDirectory(run_dir)
    metrics = finished(directory.path, config) or finished_elsewhere(directory.path, config)
    if metrics and unchanged(metrics, config):
        return metrics
    stamped = stamps(config)  # before the files are read
    with ExitStack() as stack:
        alone = config["trainer"]["devices"] == 1 or not launched()
        if directory.path.joinpath("metrics.json").exists() and alone:
            stack.enter_context(directory.lock(wait))  # wait before loading anything
            job = prepare(config)
        else:
            job = prepare(config)
            other = finished_elsewhere(directory.path, config) if test else None
            if other and not job.contents.changes(other):
                return other
            if not job.rank:
                stack.enter_context(directory.lock(wait))
        metrics = finished(directory.path, config) or {}
        if metrics and not job.contents.changes(metrics):
            directory.write_metrics({**metrics, "stamps": stamped})
            return metrics
        if job.rank:  # under a launcher, only rank 0 writes
            job = job.with_teachers(find_teachers(job.plan, job.data))
            launch(job.processes, train_student, job, directory.path, None, callbacks, test)
            return {}
        record, resumes = begin_record(job, directory, stamped)
        try:
            job = job.with_teachers(find_teachers(job.plan, job.data))
            resume = directory.checkpoint() if resumes else None
            arguments = (job, directory.path, resume, callbacks, test)
            record |= launch(job.processes, train_student, *arguments)
        except Stopped:
            raise  # can be resumed
        except BaseException as error:
            directory.write_metrics({**record, "status": "failed", "error": str(error)})
            raise
        record["status"] = "finished"
        directory.write_metrics(record)
        return record


# --- prepare: one process -------------------------------------------------------------------------


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

    @property
    def rank(self) -> int:
        """The rank of this process under a launcher; otherwise 0."""
        return rank(self.processes)

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
    teacher = together(teachers, plan.average)
    return build_module(plan.student, plan.data, teacher, data.count(), plan.member_terms)


def prepare(config: Node) -> Job:
    """Check and build everything except the teacher's weights and the trainer.

    Detects all invalid input, cheap checks first.

    Raises:
        InputError: the configuration, the data or a file is invalid.
    """
    check_devices(config)
    if config["trainer"].get("num_nodes", 1) != 1 and not launched():
        raise InputError(
            "trainer.num_nodes is above 1: start one process per device on every node, with "
            "torchrun or srun"
        )
    data = build_data(config["data"])
    plan = resolve(config, data)
    teachers = build_teachers(plan)
    parameters = count_teachers(plan, teachers)
    module = _build_module(plan, teachers, data)
    try_optimizer(plan.student.optimizer, plan.student.scheduler)
    for part in plan.teachers:
        try_optimizer(part.training.optimizer, part.training.scheduler, "teacher.")
    build_callbacks(plan.student.callbacks)
    try_trainer(plan.student.trainer)
    data.check_batch_size(module.images_needed * plan.student.trainer.processes)
    data.setup()
    if isinstance(module.teacher, RecordedTeacher):  # nothing could compute what is missing
        open_caches(module, plan, data, torch.device("cpu"))
    own_code = [config.get(part) for part in ("student", "method", "callbacks")]
    contents = Contents(
        images=data.fingerprint(),
        teacher=content_sha256(plan, teachers),
        code=source_sha256(
            *own_code,
            plan.student.optimizer,
            plan.student.scheduler,
            plan.data.node.get("augmentation"),
            plan.data.node.get("mixing"),
            # Of the data itself without its files, which are images.
            [{"_target_": target} for target in targets(plan.data.node)],
        ),
    )
    return Job(plan, data, teachers, module, parameters, contents)


# --- launch: all processes ------------------------------------------------------------------------


def train_student(
    job: Job,
    folder: Path,
    resume: Checkpoint | None,
    callbacks: Sequence[Callback],
    test: bool,
) -> dict[str, Any]:
    """Fit, validate and test the student; return the results.

    Args:
        job: the job, with the teacher's weights.
        folder: folder of the run.
        resume: checkpoint to resume from; rank 0 decides.
        callbacks: additional callbacks.
        test: whether to use the test images.
    """
    plan, module, data = job.plan.student, job.module, job.data
    directory = RunDirectory(folder)
    own = build_callbacks(plan.callbacks)
    average: list[Callback] = [AverageWeights(plan.ema)] if plan.ema is not None else []
    if isinstance(module.teacher, MeanTeacher):
        average.append(FollowStudent(module.teacher))
    trainer = build_trainer(
        plan.trainer, folder, job.plan.name, resume, [*average, *callbacks, *own], plan.pictures
    )
    # Get the device now, as testing moves the module back to the CPU.
    device = trainer.strategy.root_device
    if job.teachers:
        open_caches(module, job.plan, data, device)
    if trainer.world_size > 1:
        trainer.strategy.setup_environment()
        resume = trainer.strategy.broadcast(resume)
    known = {}
    if job.teachers and job.teacher_facts is None and not isinstance(module.teacher, MeanTeacher):
        trainer.validate(module, data, verbose=False)
        known["teacher_val_accuracy"] = metric(trainer, "val/teacher_accuracy")

    # Seed again, so that the random numbers do not depend on whether a teacher was trained.
    seed_everything(plan.seed, verbose=False)
    results = fitting.fit(
        trainer, module, data, directory, "student", resume, plan.update_bn, revalidate=bool(own)
    )
    if test:
        results |= fitting.test(trainer, module, data, directory, results, plan.update_bn)
    if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
        log_hparams(trainer.logger, job.plan, results, trainer.global_step)
    return {
        **_teacher_results(job, trainer),
        **known,
        **_sizes(count_parameters(module.student), job.teacher_parameters),
        **results,
        **versions(),
        "device": device_name(device),
        "processes": trainer.world_size,
        "precision": plan.trainer.precision,
    }


def _digest(keys: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()


def _sizes(parameters: int, teacher_parameters: int | None) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "teacher_parameters": teacher_parameters,
        "compression_ratio": teacher_parameters / parameters if teacher_parameters else None,
    }


def _teacher_results(job: Job, trainer: Trainer) -> dict[str, Any]:
    """Results of the teacher; None if the method has none."""
    found: dict[str, Any] = dict.fromkeys(
        ("teacher_val_accuracy", "teacher_test_accuracy", "agreement", "teacher_key")
    )
    if job.stored and None not in job.stored:
        keys = [stored.key for stored in job.stored if stored is not None]
        found["teacher_key"] = keys[0] if len(keys) == 1 else _digest(keys)
    if job.teacher_facts is not None:
        for part in ("val", "test"):
            found[f"teacher_{part}_accuracy"] = job.teacher_facts[f"{part}_accuracy"]
    measured = {"agreement": "test/agreement", "teacher_test_accuracy": "test/teacher_accuracy"}
    for key, name in measured.items():
        if name in trainer.callback_metrics:
            found[key] = metric(trainer, name)
    return found


# --- record: one process --------------------------------------------------------------------------


def begin_record(job: Job, directory: RunDirectory, stamped: str) -> tuple[dict[str, Any], bool]:
    """Write the initial metrics and the configuration of a run.

    Returns:
        The metrics, and whether to resume an interrupted training.
    """
    plan = job.plan
    earlier = directory.read_metrics()
    if changes := job.contents.changes(earlier):
        place = plan.output_dir / "superseded" / directory.path.parent.name
        aside = directory.set_aside(place)
        log.warning(
            "changed since %s was run: %s; retraining it, the earlier run is kept in %s",
            directory.path.name, ", ".join(changes), aside,
        )  # fmt: skip
        earlier = {}
    record = {
        **_identity(plan),
        "config_key": plan.key,
        "baseline_key": plan.baseline_key,
        **job.contents.as_metrics(),
        "stamps": stamped,
        "class_names": [str(name) for name in job.data.classes],
    }
    if not plan.teachers:
        record["key_without_teacher"] = plan.key_without_teacher
    directory.write_metrics(record)
    directory.write_config(plan.config)
    return record, earlier.get("config_key") == plan.key


def _identity(plan: Plan) -> dict[str, Any]:
    return {
        "status": "running",
        "name": plan.name,
        "setting": plan.setting,
        "method": plan.method,
        "student": plan.student.name,
        "teacher": plan.teacher_name,
        "data": plan.data.name,
        "seed": plan.student.seed,
    }


def record_failure(config: Node, run_dir: str | Path, error: Exception) -> None:
    """Record a run of a grid that could not start, so that the grid's table shows it as failed."""
    directory = RunDirectory(run_dir)
    if directory.read_metrics().get("status") != "finished":
        directory.write_metrics(
            {
                "status": "failed",
                **{part: config[part] for part in ("name", "setting")},
                **{part: config[part]["name"] for part in ("method", "student", "teacher", "data")},
                "seed": config["seed"],
                "error": str(error),
            }
        )
