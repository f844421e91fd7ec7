"""A run from beginning to end: data, teacher, module, trainer, in the order one would tell it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from kd_lightning import fitting
from kd_lightning.building import (
    SUPERVISED,
    build_data,
    build_module,
    build_teacher,
    channels_last,
    fill_in,
    needs_teacher,
    normalizations,
    resolve_precision,
    try_optimizer,
)
from kd_lightning.callbacks import build_callbacks
from kd_lightning.config import Node, build, check, check_sections, select, trainer_node
from kd_lightning.data.module import ImageDataModule
from kd_lightning.distillation import DistillationModule
from kd_lightning.divergence import first_not_finite
from kd_lightning.errors import InputError, Stopped
from kd_lightning.fitting import build_trainer, metric
from kd_lightning.frozen import FrozenTeacher
from kd_lightning.hparams import log_hparams
from kd_lightning.losses import Term
from kd_lightning.memory import DTYPES, GIGABYTE, Memory, Rows, folder_name
from kd_lightning.models import count_parameters
from kd_lightning.naming import config_key, finished, twin
from kd_lightning.ranks import Meet, together
from kd_lightning.runs import Checkpoint, RunDirectory, device_name, load_weights, versions
from kd_lightning.teachers import StoredTeacher, TeacherStore, teacher_key, weights_sha256

log = logging.getLogger(__name__)


def run(
    config: Node,
    run_dir: str | Path,
    wait: bool = True,
    callbacks: Sequence[Callback] = (),
    test: bool = True,
) -> dict[str, Any]:
    """Train and test one student; return what `metrics.json` then holds.

    A run that is finished is left as it is, one that was interrupted goes on.

    Args:
        config: the complete configuration, plain (see `kd_lightning.config.plain`).
        run_dir: the folder of this run.
        wait: for another process that is working on the same run.
        callbacks: of Lightning's, that look on at the student's training.
        test: whether the test images are looked at; a search must not.

    Raises:
        InputError: before any training, if the configuration, the data or a file is wrong.
        RunError: training could not go on.
    """
    check_sections(config)
    directory = RunDirectory(run_dir)
    with directory.lock(wait):
        return finished(directory.path, config) or _run(config, directory, callbacks, test)


def _run(
    config: Node, directory: RunDirectory, callbacks: Sequence[Callback], test: bool
) -> dict[str, Any]:
    key = config_key(config)
    resume = None
    if directory.read_metrics().get("config_key") == key:
        resume = directory.checkpoint()
    metrics: dict[str, Any] = {
        "status": "running",
        **{part: config[part] for part in ("name", "setting")},
        "config_key": key,
        **{part: config[part]["name"] for part in ("method", "student", "teacher", "data")},
        "seed": config["seed"],
    }
    copied = None
    if not needs_teacher(config):
        metrics["key_without_teacher"] = config_key(config, "teacher")
        copied = twin(config) if test and not resume else None
    directory.write_metrics(metrics)
    try:
        if copied:  # what it says of itself stays
            metrics = {**_take_over(config, directory, copied), **metrics}
        else:
            others = (config, directory.path, resume, test)
            with together(trainer_node(config), help_with, *others) as meet:
                metrics |= _distil(config, directory, resume, callbacks, test, meet)
    except Stopped:
        raise  # it will go on
    except BaseException as error:
        directory.write_metrics({**metrics, "status": "failed", "error": str(error)})
        raise
    metrics["status"] = "finished"
    directory.write_metrics(metrics)
    return metrics


def _take_over(config: Node, directory: RunDirectory, other: Path) -> dict[str, Any]:
    """The results of a run that differs in nothing but a teacher that neither of them has."""
    config = fill_in(config, build_data(config))
    directory.write_config(config)
    directory.copy_results(other)
    metrics = RunDirectory(other).read_metrics()
    teacher_parameters = _teacher_parameters(config, None)
    return {
        **metrics,
        "teacher_parameters": teacher_parameters,
        "compression_ratio": teacher_parameters / metrics["parameters"],
        "copied_from": str(other),
    }


def _distil(
    config: Node,
    directory: RunDirectory,
    resume: Checkpoint | None,
    callbacks: Sequence[Callback],
    test: bool,
    meet: Meet,
) -> dict[str, Any]:
    # Everything that can be wrong comes first; data, teacher and training cost more and more.
    data = build_data(config)
    config = fill_in(config, data)
    check(config)
    precision = resolve_precision(trainer_node(config))
    directory.write_config(config)
    teacher = build_teacher(config) if needs_teacher(config) else None
    module = build_module(config, teacher, precision)
    for role in ("", "teacher.") if teacher else ("",):
        try_optimizer(select(config, f"{role}optimizer"), select(config, f"{role}scheduler"), role)
    own = build_callbacks(config.get("callbacks") or {})
    trainer = build_trainer(
        trainer_node(config), precision, directory.path, config["name"], resume, [*callbacks, *own]
    )
    data.check_batch_size(module.images_needed * trainer.world_size)
    data.setup()

    facts: dict[str, Any] = {}
    if teacher is not None:
        facts = equip_teacher(teacher, config, data)
        equip_memory(module, config, data, precision)
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
    parameters = count_parameters(module.student)
    teacher_parameters = _teacher_parameters(config, teacher)
    return {
        "parameters": parameters,
        "teacher_parameters": teacher_parameters,
        "compression_ratio": teacher_parameters / parameters,
        **results,
        "teacher_val_accuracy": None,
        "teacher_test_accuracy": None,
        "agreement": None,
        "teacher_key": None,
        **facts,
        **_teacher_results(trainer),
        **versions(),
        "device": device_name(module.device),
        "processes": trainer.world_size,
        "precision": precision,
    }


def help_with(
    config: Node, folder: Path, resume: Checkpoint | None, test: bool, meet: Meet
) -> None:
    """Take part in a run that another process has begun; see `kd_lightning.ranks`."""
    _distil(config, RunDirectory(folder), resume, (), test, meet)


def equip_teacher(teacher: FrozenTeacher, config: Node, data: ImageDataModule) -> dict[str, Any]:
    """Give the teacher its weights, training it first if nobody has.

    Returns:
        What is known of it: key and accuracies; nothing of the user's own checkpoint.
    """
    if config["teacher"]["checkpoint"] is not None:
        _check_weights(teacher, f"teacher.checkpoint={config['teacher']['checkpoint']}")
        return {}
    precision = resolve_precision(trainer_node(config, teacher=True))
    key = teacher_key(config, data, precision)
    store = TeacherStore(Path(config["output_dir"]) / "teachers")
    stored: StoredTeacher = store.obtain(
        config["teacher"]["name"],
        key,
        lambda folder: train_teacher(config, data, precision, RunDirectory(folder)),
    )
    load_weights(teacher.model, stored.weights)
    _check_weights(teacher, str(stored.weights))
    return {
        "teacher_key": key,
        "teacher_val_accuracy": stored.facts["val_accuracy"],
        "teacher_test_accuracy": stored.facts["test_accuracy"],
    }


def _check_weights(teacher: FrozenTeacher, origin: str) -> None:
    name = first_not_finite(teacher.model.named_parameters())
    if name is not None:
        raise InputError(
            f"the teacher's weights are not finite ('{name}' in {origin}): "
            "its training has diverged, or the file is damaged"
        )


def equip_memory(
    module: DistillationModule, config: Node, data: ImageDataModule, precision: str
) -> None:
    """Let the module keep what its teacher, complete with its weights, says."""
    settings = config["remember"]
    if not settings["disk_gb"]:
        return
    assert module.teacher is not None
    expects, given = normalizations(config)
    root = Path(config["output_dir"]) / "teachers" / "remembered"
    limit = settings["disk_gb"] * GIGABYTE

    def rows(what: str, key: Node, images: int, shape: tuple[int, ...], dtype: str) -> Rows:
        key = {**teacher, **key, "dtype": dtype}
        folder = root / folder_name(config["teacher"]["name"], what, key)
        return Rows(folder, key, images, shape, DTYPES[dtype])

    teacher: Node = {
        "format": 1,
        "teacher": {**config["teacher"]["model"], "weights": weights_sha256(module.teacher.model)},
        "normalization": [*expects, *given],
        "images": data.fingerprint(),
        "precision": precision,
    }
    # Evaluation is exact: what it reports must not depend on a rounding.
    classes = config["data"]["num_classes"]
    kept = {"logits": rows("evaluation", {}, len(data.labels), (classes,), "float32")}
    module.evaluation_memory = Memory(kept, root, limit)

    terms = {name: cast(Term, term) for name, term in module.terms.items() if term.needs_teacher}
    why = "" if data.reproducible else f"the views of {data.name} are not reproducible"
    for name, term in terms.items():
        if term.depends_on() is None:
            why = f"the term {name} does not say what it depends on (Term.depends_on)"
    if why:
        log.warning("what the teacher says in training is not stored: %s", why)
        return
    views: Node = {
        "split": [data.val_fraction, data.split_seed],
        "augmentation": asdict(data.augmentation),
    }
    blank = torch.zeros(1, 3, data.image_size, data.image_size)
    said = module.ask_teacher(blank)
    kept = {}
    for name, term in terms.items():
        kind = f"{type(term).__module__}.{type(term).__qualname__}"
        key = {**views, "term": {"class": kind, **(term.depends_on() or {})}}
        shape = tuple(said[name].shape[1:])
        kept[name] = rows(name, key, data.train_size, shape, settings["dtype"])
    module.memory = Memory(kept, root, limit)


def train_teacher(
    config: Node, data: ImageDataModule, precision: str, directory: RunDirectory
) -> dict[str, Any]:
    """Train the configured teacher on the labels and leave `teacher.safetensors`."""
    teacher = config["teacher"]
    settings = trainer_node(config, teacher=True)
    expects, _ = normalizations(config)
    data = data.variant(
        seed=teacher["seed"],
        views=None,
        mean=expects.mean,
        std=expects.std,
        augmentation=replace(data.augmentation, cutout=teacher["cutout"], seed=teacher["seed"]),
    )
    seed_everything(teacher["seed"], verbose=False)
    module = DistillationModule(
        student=teacher["model"],
        terms=SUPERVISED,
        optimizer=teacher["optimizer"],
        scheduler=teacher["scheduler"],
        num_classes=config["data"]["num_classes"],
        image_size=config["data"]["image_size"],
        channels_last=channels_last(settings, precision),
    )
    directory.write_config(config)
    resume = directory.checkpoint()
    name = f"teacher {teacher['name']}"
    trainer = build_trainer(settings, precision, directory.path, name, resume)
    results = fitting.fit(trainer, module, data, directory, "teacher", resume)
    results |= fitting.test(trainer, module, data, directory, results, update_bn=False)
    return {"parameters": count_parameters(module.student), **results, **versions()}


def show_in_tensorboard(trainer: Trainer, config: Node, results: Mapping[str, Any]) -> None:
    """Give the run its line on TensorBoard's page of hyper-parameters."""
    if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
        teacher = config["teacher"]["name"] if needs_teacher(config) else "none"
        log_hparams(trainer.logger, config, teacher, results, trainer.global_step)


def _teacher_parameters(config: Node, teacher: FrozenTeacher | None) -> int:
    if teacher is not None:
        return count_parameters(teacher.model)
    with torch.device("meta"):  # counted, never computed with
        return count_parameters(build(config["teacher"]["model"], "teacher.model"))


def _teacher_results(trainer: Trainer) -> dict[str, float]:
    found = {"agreement": "test/agreement", "teacher_test_accuracy": "test/teacher_accuracy"}
    return {
        key: metric(trainer, name)
        for key, name in found.items()
        if name in trainer.callback_metrics
    }
