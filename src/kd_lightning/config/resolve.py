"""Resolve a configuration to the plan of a run: defaults, `auto`, and values from the data set."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from torch import nn

from kd_lightning.config.checks import AVERAGES, check, single_teachers, trainer_node
from kd_lightning.config.hardware import (
    check_accelerator,
    choose_memory_format,
    choose_precision,
    device_type,
)
from kd_lightning.config.naming import config_key
from kd_lightning.config.nodes import Node, build, find_target, without
from kd_lightning.config.plan import (
    CachePlan,
    CheckpointPlan,
    DataPlan,
    Plan,
    TeacherPlan,
    TrainerPlan,
    TrainingPlan,
)
from kd_lightning.config.stored import student_model
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.views import Normalization

log = logging.getLogger(__name__)

GIGABYTE = 10**9

SUPERVISED: dict[str, Node] = {
    "cross_entropy": {"_target_": "kd_lightning.losses.CrossEntropy", "weight": 1.0}
}
"""The terms of plain supervised training, used for teachers."""

TEACHER_FORMAT = 1  # increment when the same configuration starts to give different weights
# Keys that do not affect a teacher's weights: paths, logging, hardware, and the student's own.
_NOT_OF_THE_TEACHER = {
    "data": (
        "name",
        "root",
        "cache_dir",
        "resize",  # this and the next: the fingerprint of the images is part of the key
        "test_folder",
        "eval_batch_size",
        "seed",
        "views",
        "augmentation",
        "mixing",
    ),
    "trainer": ("accelerator", "log_every_n_steps", "memory_format"),
}


def resolve(config: Node, data: ImageDataModule) -> Plan:
    """Resolve defaults and validate the configuration.

    Args:
        config: composed, as plain dictionaries.
        data: the data module of the configuration; its images need not be loaded.

    Raises:
        InputError: a value is invalid; the message names the key and the valid values.
    """
    written, config = config, _fill_in(config, data)
    check(config)
    node = config["data"]
    data_plan = DataPlan(
        name=node["name"],
        node=node,
        num_classes=node["num_classes"],
        image_size=node["image_size"],
        normalization=Normalization(tuple(node["mean"]), tuple(node["std"])),
    )
    return Plan(
        name=config["name"],
        setting=config["setting"],
        output_dir=Path(config["output_dir"]),
        method=config["method"]["name"],
        student=TrainingPlan(
            name=config["student"]["name"],
            model=student_model(config),
            terms=config["method"]["terms"],
            optimizer=config["optimizer"],
            scheduler=config["scheduler"],
            seed=config["seed"],
            trainer=resolve_trainer(trainer_node(config), student_model(config)),
            callbacks=config.get("callbacks") or {},
            update_bn=config.get("update_bn", False) or config.get("ema") is not None,
            ema=config.get("ema"),
            pictures=config.get("pictures", True),
            loggers=config.get("logger") or {},
        ),
        teachers=tuple(_resolve_teacher(part, data_plan) for part in single_teachers(config))
        if needs_teacher(config)
        else (),
        member_terms=tuple(part["method"]["terms"] for part in single_teachers(config)),
        average=config["teacher"].get("average", AVERAGES[0]),
        teacher_name=config["teacher"]["name"],
        teacher_models=tuple(part["teacher"]["model"] for part in single_teachers(config)),
        data=data_plan,
        cache=_resolve_cache(config),
        # Hash the configuration as written: filling in the classes must not rename a run.
        key=config_key(written),
        key_without_teacher=config_key(written, "teacher"),
        baseline_key=config_key(written, "teacher", "method"),
        config=config,
    )


def _fill_in(config: Node, data: ImageDataModule) -> Node:
    """Fill in the number of classes from the data set."""
    if config["data"].get("num_classes") is not None:
        return config
    classes = len(data.classes)

    def fill(node: Any) -> Any:
        if isinstance(node, list):
            return [fill(value) for value in node]
        if not isinstance(node, dict):
            return node
        node = {key: fill(value) for key, value in node.items()}
        if node.get("num_classes", classes) is None:
            node["num_classes"] = classes
        return node

    return fill(config)


def _resolve_teacher(config: Node, data: DataPlan) -> TeacherPlan:
    teacher = config["teacher"]
    trainer = resolve_trainer(trainer_node(config, teacher=True), teacher["model"])
    checkpoint = None
    if teacher["checkpoint"] is not None:
        checkpoint = CheckpointPlan(
            path=Path(str(teacher["checkpoint"])).expanduser(),
            rename_keys=teacher["rename_keys"] or {},
            ignore_keys=tuple(teacher.get("ignore_keys") or ()),
            key=teacher.get("checkpoint_key"),
        )
    return TeacherPlan(
        normalization=Normalization(
            tuple(teacher["mean"] or data.normalization.mean),
            tuple(teacher["std"] or data.normalization.std),
        ),
        training=TrainingPlan(
            name=teacher["name"],
            model=teacher["model"],
            terms=SUPERVISED,
            optimizer=teacher["optimizer"],
            scheduler=teacher["scheduler"],
            seed=teacher["seed"],
            trainer=trainer,
            callbacks={},
            update_bn=False,
            ema=None,
            pictures=config.get("pictures", True),
            loggers=config.get("logger") or {},
        ),
        cutout=teacher["cutout"],
        augmentation=teacher.get("augmentation"),
        mixing=teacher.get("mixing"),
        checkpoint=checkpoint,
        recipe=teacher_recipe(config, trainer.precision),
        outputs=Path(teacher["outputs"]) if teacher.get("outputs") else None,
        decay=teacher.get("decay"),
    )


def teacher_recipe(config: Node, precision: str) -> Node:
    """The parts of a configuration that determine its teacher's weights.

    Args:
        config: complete; keys in `_NOT_OF_THE_TEACHER` are ignored.
        precision: precision that the teacher is trained in.
    """
    teacher = config["teacher"]
    trainer = without(trainer_node(config, teacher=True), *_NOT_OF_THE_TEACHER["trainer"])
    own = {key: teacher[key] for key in ("augmentation", "mixing") if teacher.get(key) is not None}
    return {
        "format": TEACHER_FORMAT,
        **{part: teacher[part] for part in ("model", "seed", "cutout", "optimizer", "scheduler")},
        "normalization": [teacher["mean"], teacher["std"]],
        "trainer": {**trainer, "precision": precision},
        "data": {
            **without(config["data"], *_NOT_OF_THE_TEACHER["data"]),
            # The teacher's own views, independent of the student's.
            "cutout": teacher["cutout"],
            "view_seed": teacher["seed"],
        },
        **own,
    }


def _resolve_cache(config: Node) -> CachePlan | None:
    settings = config["remember"]
    if not settings["disk_gb"]:
        return None
    root = Path(config["output_dir"]) / "teachers" / "remembered"
    limit, top_k = settings["disk_gb"] * GIGABYTE, settings.get("top_k", "auto")
    return CachePlan(root, limit, settings["dtype"], top_k)


def needs_teacher(config: Node) -> bool:
    """Whether any term of the method needs a teacher."""
    return any(
        getattr(find_target(term["_target_"], f"method.terms.{name}"), "needs_teacher", True)
        for name, term in config["method"]["terms"].items()
    )


def check_devices(config: Node) -> None:
    """Check that the devices for student and teacher exist.

    Raises:
        InputError: see `hardware.check_accelerator`.
    """
    teachers = single_teachers(config) if needs_teacher(config) else []
    trainers = [trainer_node(config), *(trainer_node(part, teacher=True) for part in teachers)]
    for trainer, path in zip(
        trainers, ["trainer", *["teacher.trainer"] * len(teachers)], strict=True
    ):
        check_accelerator(trainer["accelerator"], trainer["devices"], path)


def resolve_trainer(trainer: Node, model: Node) -> TrainerPlan:
    """Resolve precision, memory format and the number of processes.

    Args:
        trainer: the trainer section of the configuration.
        model: `_target_` node of the model to train.
    """
    accelerator, devices = trainer["accelerator"], trainer["devices"]
    precision = _resolve_precision(trainer, model)
    memory_format = {
        "auto": choose_memory_format(precision, accelerator),
        "channels_last": torch.channels_last,
        "contiguous": torch.contiguous_format,
    }[trainer["memory_format"]]
    if devices == "auto":
        kind = AcceleratorRegistry[device_type(accelerator)]["accelerator"]
        devices = kind.auto_device_count()
    return TrainerPlan(
        arguments=without(trainer, "memory_format", "precision"),
        precision=precision,
        channels_last=memory_format == torch.channels_last,
        processes=devices * trainer.get("num_nodes", 1),
    )


def _resolve_precision(trainer: Node, model: Node) -> str:
    precision, accelerator = trainer["precision"], trainer["accelerator"]
    if precision != "auto":
        return precision
    chosen = choose_precision(accelerator)
    if chosen == "bf16-mixed" and device_type(accelerator) == "cpu":
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = build(model, "the model")
        chosen = choose_precision(accelerator, network)
        if chosen == "32-true":
            log.info("precision 32-true: grouped convolutions are slow in bfloat16 on a CPU")
    return chosen
