"""A run from beginning to end: data, teacher, module, trainer, in the order one would tell it."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from kd_lightning import fitting
from kd_lightning.building import (
    build_data,
    build_module,
    build_teacher,
    check_devices,
    fill_in,
    needs_teacher,
    resolve_precision,
    try_optimizer,
)
from kd_lightning.callbacks import build_callbacks
from kd_lightning.config import Node, build, check, check_sections, select, trainer_node
from kd_lightning.contents import Contents, source_sha256, stamps, targets
from kd_lightning.data.module import ImageDataModule
from kd_lightning.distillation import DistillationModule
from kd_lightning.errors import Stopped
from kd_lightning.fitting import build_trainer, metric, try_trainer
from kd_lightning.frozen import FrozenTeacher
from kd_lightning.hparams import log_hparams
from kd_lightning.models import count_parameters
from kd_lightning.models.preparing import materialize
from kd_lightning.naming import config_key, finished, twin, unchanged
from kd_lightning.ranks import Meet, together
from kd_lightning.runs import Checkpoint, RunDirectory, device_name, versions
from kd_lightning.teachers import weights_sha256
from kd_lightning.teaching import check_weights, equip_memory, equip_teacher

log = logging.getLogger(__name__)

OWN_CODE = ("student", "method", "optimizer", "scheduler", "callbacks")
"""Sections whose code and files, where they are the user's own, a student depends on."""


class Job(NamedTuple):
    """A run whose configuration, data and models have been checked: it can begin.

    Attributes:
        config: complete, with what only the data set knows.
        precision: as Lightning calls it.
        data: loaded.
        teacher: without its weights if it is trained here; None if the method needs none.
        module: the student and the method's terms.
        teacher_parameters: None if it cannot be built.
        contents: of the files and code that the configuration names.
    """

    config: Node
    precision: str
    data: ImageDataModule
    teacher: FrozenTeacher | None
    module: DistillationModule
    teacher_parameters: int | None
    contents: Contents


def run(
    config: Node,
    run_dir: str | Path,
    wait: bool = True,
    callbacks: Sequence[Callback] = (),
    test: bool = True,
) -> dict[str, Any]:
    """Train and test one student; return what `metrics.json` then holds.

    A finished run is left as it is, an interrupted one is resumed. If the images, the teacher or
    the user's own code have changed since, the earlier run is moved to `output_dir/superseded`.

    Args:
        config: the complete configuration, plain (see `kd_lightning.config.plain`).
        run_dir: the folder of this run.
        wait: for another process that is working on the same run.
        callbacks: of Lightning's, for the student's training.
        test: whether the test images are looked at; a search must not.

    Raises:
        InputError: before any training, if the configuration, the data or a file is wrong.
            Nothing is written then.
        RunError: training could not go on.
    """
    check_sections(config)
    directory = RunDirectory(run_dir)
    metrics = finished(directory.path, config)
    if metrics and unchanged(metrics, config):
        return metrics
    stamped = stamps(config)  # before the files are read
    with ExitStack() as stack:
        if directory.path.joinpath("metrics.json").exists():
            stack.enter_context(directory.lock(wait))  # before loading anything only to wait
            job = prepare(config)
        else:
            job = prepare(config)
            stack.enter_context(directory.lock(wait))
        metrics = finished(directory.path, config) or {}
        if metrics and not job.contents.changes(metrics):
            directory.write_metrics({**metrics, "stamps": stamped})
            return metrics
        return _run(job, config, stamped, directory, callbacks, test)


def prepare(config: Node) -> Job:
    """Check and build everything that a run needs but its teacher's weights and a trainer.

    Whatever can be wrong shows here, in the order of what it costs.

    Raises:
        InputError: the configuration, the data or a file is wrong.
    """
    check_devices(config)
    data = build_data(config)
    config = fill_in(config, data)
    check(config)
    precision = resolve_precision(trainer_node(config), config["student"]["model"])
    teacher = build_teacher(config) if needs_teacher(config) else None
    if teacher is not None:
        check_weights(teacher, f"teacher.checkpoint={config['teacher']['checkpoint']}")
    parameters = _teacher_parameters(config, teacher)
    module = build_module(config, teacher, precision)
    for role in ("", "teacher.") if teacher else ("",):
        try_optimizer(select(config, f"{role}optimizer"), select(config, f"{role}scheduler"), role)
    build_callbacks(config.get("callbacks") or {})
    try_trainer(trainer_node(config), precision)
    data.check_batch_size(module.images_needed)
    data.setup()
    contents = Contents(
        images=data.fingerprint(),
        teacher=_teacher_sha256(config, teacher) if teacher else None,
        code=source_sha256(
            *(config.get(part) for part in OWN_CODE),
            [{"_target_": target} for target in targets(config["data"])],  # its files are images
        ),
    )
    return Job(config, precision, data, teacher, module, parameters, contents)


def _teacher_sha256(config: Node, teacher: FrozenTeacher) -> str | None:
    """Of what the teacher is, as far as the configuration and the images do not determine it."""
    code = source_sha256(config["teacher"]["model"])
    if config["teacher"]["checkpoint"] is None:
        return code
    return hashlib.sha256(f"{weights_sha256(teacher.model)} {code}".encode()).hexdigest()


def _run(
    job: Job,
    config: Node,
    stamped: str,
    directory: RunDirectory,
    callbacks: Sequence[Callback],
    test: bool,
) -> dict[str, Any]:
    key = config_key(config)
    earlier = directory.read_metrics()
    if changes := job.contents.changes(earlier):
        place = Path(config["output_dir"]) / "superseded" / directory.path.parent.name
        aside = directory.set_aside(place)
        log.warning(
            "changed since %s was run: %s; it is trained again, the earlier run is kept in %s",
            directory.path.name, ", ".join(changes), aside,
        )  # fmt: skip
        earlier = {}
    resume = directory.checkpoint() if earlier.get("config_key") == key else None
    metrics: dict[str, Any] = {
        "status": "running",
        **{part: config[part] for part in ("name", "setting")},
        "config_key": key,
        **job.contents.as_metrics(),
        "stamps": stamped,
        **{part: config[part]["name"] for part in ("method", "student", "teacher", "data")},
        "seed": config["seed"],
    }
    copied = None
    if job.teacher is None:
        metrics["key_without_teacher"] = config_key(config, "teacher")
        copied = twin(config, job.contents.as_metrics()) if test and not resume else None
    directory.write_metrics(metrics)
    try:
        directory.write_config(job.config)
        if copied:  # what it says of itself stays
            metrics = {**_take_over(job, directory, copied), **metrics}
        else:
            others = (config, directory.path, resume, test)
            with together(trainer_node(config), help_with, *others) as meet:
                metrics |= _distil(job, directory, resume, callbacks, test, meet)
    except Stopped:
        raise  # it will be resumed
    except BaseException as error:
        directory.write_metrics({**metrics, "status": "failed", "error": str(error)})
        raise
    metrics["status"] = "finished"
    directory.write_metrics(metrics)
    return metrics


def record_failure(config: Node, run_dir: str | Path, error: Exception) -> None:
    """Note that a cell of a grid could not begin, so that the grid's table shows it as failed."""
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


def _take_over(job: Job, directory: RunDirectory, other: Path) -> dict[str, Any]:
    """The results of a run that differs in nothing but a teacher that neither of them has."""
    directory.copy_results(other)
    metrics = RunDirectory(other).read_metrics()
    return {
        **metrics,
        **_size(metrics["parameters"], job.teacher_parameters),
        "copied_from": str(other),
    }


def _size(parameters: int, teacher_parameters: int | None) -> dict[str, Any]:
    ratio = teacher_parameters / parameters if teacher_parameters else None
    return {
        "parameters": parameters,
        "teacher_parameters": teacher_parameters,
        "compression_ratio": ratio,
    }


def _distil(
    job: Job,
    directory: RunDirectory,
    resume: Checkpoint | None,
    callbacks: Sequence[Callback],
    test: bool,
    meet: Meet,
) -> dict[str, Any]:
    config, precision, data, teacher, module, _, _ = job
    own = build_callbacks(config.get("callbacks") or {})
    trainer = build_trainer(
        trainer_node(config), precision, directory.path, config["name"], resume,
        [*callbacks, *own], config.get("pictures", True),
    )  # fmt: skip
    data.check_batch_size(module.images_needed * trainer.world_size)
    # A module that is tested is brought back to the CPU: ask before.
    device = trainer.strategy.root_device
    facts: dict[str, Any] = {}
    if teacher is not None:
        facts = equip_teacher(teacher, config, data)
        equip_memory(module, config, data, precision, device)
    meet(trainer.world_size)
    if teacher is not None and "teacher_val_accuracy" not in facts:
        trainer.validate(module, data, verbose=False)
        facts["teacher_val_accuracy"] = metric(trainer, "val/teacher_accuracy")

    # Again: training a teacher must not change what the student draws.
    seed_everything(config["seed"], verbose=False)
    update_bn = config.get("update_bn", False)
    results = fitting.fit(
        trainer, module, data, directory, "student", resume, update_bn, revalidate=bool(own)
    )
    if test:
        results |= fitting.test(trainer, module, data, directory, results, update_bn)
    show_in_tensorboard(trainer, config, results)
    return {
        **_size(count_parameters(module.student), job.teacher_parameters),
        **results,
        "teacher_val_accuracy": None,
        "teacher_test_accuracy": None,
        "agreement": None,
        "teacher_key": None,
        **facts,
        **_teacher_results(trainer),
        **versions(),
        "device": device_name(device),
        "processes": trainer.world_size,
        "precision": precision,
    }


def help_with(
    config: Node, folder: Path, resume: Checkpoint | None, test: bool, meet: Meet
) -> None:
    """Take part in a run that another process has begun; see `kd_lightning.ranks`."""
    _distil(prepare(config), RunDirectory(folder), resume, (), test, meet)


def show_in_tensorboard(trainer: Trainer, config: Node, results: Mapping[str, Any]) -> None:
    """Give the run its line on TensorBoard's page of hyper-parameters."""
    if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
        teacher = config["teacher"]["name"] if needs_teacher(config) else "none"
        log_hparams(trainer.logger, config, teacher, results, trainer.global_step)


def _teacher_parameters(config: Node, teacher: FrozenTeacher | None) -> int | None:
    if teacher is not None:
        return count_parameters(teacher.model)
    try:
        with torch.device("meta"):  # counted, never computed with
            return count_parameters(build(config["teacher"]["model"], "teacher.model"))
    except Exception:  # its constructor needs numbers
        pass
    try:
        model = build(config["teacher"]["model"], "teacher.model")
        materialize(model, config["data"]["image_size"], "teacher.model")
        return count_parameters(model)
    except Exception as error:  # a missing package, a download: no reason to refuse the student
        log.warning("the teacher's parameters are not counted: %s", error)
        return None


def _teacher_results(trainer: Trainer) -> dict[str, float]:
    found = {"agreement": "test/agreement", "teacher_test_accuracy": "test/teacher_accuracy"}
    return {
        key: metric(trainer, name)
        for key, name in found.items()
        if name in trainer.callback_metrics
    }
