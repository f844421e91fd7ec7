"""A complete run: prepare (`jobs`), launch, record (`record`)."""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything

from kd_lightning.config.checks import check_sections
from kd_lightning.config.finished import finished, finished_elsewhere
from kd_lightning.config.hardware import device_type
from kd_lightning.config.launcher import find_launcher, uses_several
from kd_lightning.config.nodes import Node
from kd_lightning.distill.caching import open_caches
from kd_lightning.distill.mean_teacher import MeanTeacher
from kd_lightning.engine import fitting, group
from kd_lightning.engine.callbacks.averaging import AverageWeights
from kd_lightning.engine.callbacks.following import FollowStudent
from kd_lightning.engine.callbacks.stopping import stoppable
from kd_lightning.engine.callbacks.users import build_callbacks
from kd_lightning.engine.fitting import metric
from kd_lightning.engine.launch import launch
from kd_lightning.engine.loggers import closing
from kd_lightning.engine.memory import explained
from kd_lightning.engine.trainer import build_trainer
from kd_lightning.errors import RunError, Stopped
from kd_lightning.models import count_parameters
from kd_lightning.reports.hparams import log_results, log_settings
from kd_lightning.storage.identity import stamps, unchanged
from kd_lightning.storage.provenance import device_name, versions
from kd_lightning.storage.run_directory import Checkpoint, RunDirectory
from kd_lightning.workflows.costs import count_costs, networks_of
from kd_lightning.workflows.jobs import Job, prepare
from kd_lightning.workflows.nodes import check_nodes
from kd_lightning.workflows.record import begin_record, record_teachers
from kd_lightning.workflows.teacher import find_teachers

log = logging.getLogger(__name__)

OFTEN = 10
"""How many times a view may be seen without a warning; docs/further-trainings.md has the cost."""


def run(
    config: Node,
    run_dir: str | Path,
    wait: bool = True,
    callbacks: Sequence[Callback] = (),
    test: bool = True,
) -> dict[str, Any]:
    """Train and test one student; return the contents of `metrics.json`.

    Under torchrun or srun, ranks other than 0 execute the tasks of rank 0, and return {}.

    A finished run is not repeated, an interrupted one is resumed. If the images, the teacher or
    user code have changed since, the earlier run is moved to `output_dir/superseded`.

    Args:
        config: the complete configuration, as plain dictionaries (see `config.complete.plain`).
        run_dir: the folder of this run.
        wait: whether to wait for another process that executes the same run.
        callbacks: additional Lightning callbacks for the student's training.
        test: whether to use the test images; a hyper-parameter search must not.

    Raises:
        InputError: the configuration, the data or a file is invalid; usually raised before any
            training and before anything is written.
        RunError: the training failed.
    """
    check_sections(config)
    launcher = find_launcher() if uses_several(config["trainer"]) else None
    if launcher is None:
        return _run(config, run_dir, wait, callbacks, test)
    process = group.join(launcher)
    if isinstance(process, group.Follower):
        if code := process.follow():
            raise RunError(f"the process of rank 0 has ended with exit code {code}")
        return {}
    try:
        return _run(config, run_dir, wait, callbacks, test)
    finally:
        process.over()


def _run(
    config: Node, run_dir: str | Path, wait: bool, callbacks: Sequence[Callback], test: bool
) -> dict[str, Any]:
    directory = RunDirectory(run_dir)
    metrics = finished(directory.path, config) or finished_elsewhere(directory.path, config)
    if metrics and unchanged(metrics, config):
        return metrics
    stamped = stamps(config)  # before the files are read
    with ExitStack() as stack:
        if directory.path.joinpath("metrics.json").exists():
            stack.enter_context(directory.lock(wait))  # wait before loading anything
            job = prepare(config)
        else:
            job = prepare(config)
            other = finished_elsewhere(directory.path, config) if test else None
            if other and not job.contents.changes(other):
                return other
            stack.enter_context(directory.lock(wait))
        metrics = finished(directory.path, config) or {}
        if metrics and not job.contents.changes(metrics):
            directory.write_metrics({**metrics, "stamps": stamped})
            return metrics
        return _train_and_record(job, directory, stamped, callbacks, test)


def _train_and_record(
    job: Job, directory: RunDirectory, stamped: str, callbacks: Sequence[Callback], test: bool
) -> dict[str, Any]:
    """Train teacher and student; return the results."""
    record, resumes = begin_record(job, directory, stamped)
    try:
        check_nodes(job, directory)
        job = job.with_teachers(find_teachers(job.plan, job.data, job.teachers))
        resumes = record_teachers(record, job.stored, directory) and resumes
        resume = directory.checkpoint() if resumes else None
        arguments = (job, directory.path, resume, callbacks, test)
        accelerator = job.plan.student.trainer.arguments["accelerator"]
        on_cpu = device_type(accelerator) == "cpu"
        record |= launch(job.processes, train_student, *arguments, on_cpu=on_cpu)
    except Stopped:
        raise  # can be resumed
    except BaseException as error:
        reason = explained(error)
        directory.write_metrics({**record, "status": "failed", "error": str(reason)})
        if reason is not error:
            raise reason from error
        raise
    finally:
        job.data.forget()
    record["status"] = "finished"
    directory.write_metrics(record)
    return record


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
        resume: checkpoint to resume from.
        callbacks: additional callbacks.
        test: whether to use the test images.
    """
    plan, module = job.plan.student, job.module
    directory = RunDirectory(folder)
    own = build_callbacks(plan.callbacks)
    average: list[Callback] = [AverageWeights(plan.ema)] if plan.ema is not None else []
    if isinstance(module.teacher, MeanTeacher):
        average.append(FollowStudent(module.teacher))
    trainer = build_trainer(
        plan.trainer, folder, job.plan.name, resume, [*average, *callbacks, *own], plan.pictures,
        plan.loggers,
    )  # fmt: skip
    with closing(trainer.loggers), stoppable():
        return _train_and_test(job, directory, trainer, resume, bool(own), test)


def _train_and_test(
    job: Job,
    directory: RunDirectory,
    trainer: Trainer,
    resume: Checkpoint | None,
    revalidate: bool,
    test: bool,
) -> dict[str, Any]:
    plan, module, data = job.plan.student, job.module, job.data
    # Get the device now, as testing moves the module back to the CPU.
    device = trainer.strategy.root_device
    if job.teachers:
        open_caches(module, job.plan, data, device)
    epochs = plan.trainer.arguments["max_epochs"]
    if data.views and epochs > OFTEN * data.views:
        log.warning(
            "data.views=%d: each view of an image is seen %.3g times, which can cost accuracy; "
            "with data.views=%d or more it would be at most %d times",
            data.views, epochs / data.views, ceil(epochs / OFTEN), OFTEN,
        )  # fmt: skip
    known = {}
    if job.teachers and job.teacher_facts is None and not isinstance(module.teacher, MeanTeacher):
        trainer.validate(module, data, verbose=False)
        known["teacher_val_accuracy"] = metric(trainer, "val/teacher_accuracy")

    if trainer.is_global_zero:
        log_settings(trainer.loggers, job.plan)
    # Seed again, so that the random numbers do not depend on whether a teacher was trained.
    seed_everything(plan.seed, verbose=False)
    results = fitting.fit(
        trainer, module, data, directory, "student", resume, plan.update_bn, revalidate
    )
    if test:
        results |= fitting.test(trainer, module, data, directory, results, plan.update_bn)
    if trainer.is_global_zero:
        log_results(trainer.loggers, job.plan, results, trainer.global_step)
    return {
        **_teacher_results(job, trainer),
        **known,
        **_sizes(count_parameters(module.student), job.teacher_parameters),
        **count_costs(
            module.student,
            directory.path / "student.safetensors",
            networks_of(job.teachers, job.plan.data.image_size),
            job.plan.data.image_size,
        ),
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
