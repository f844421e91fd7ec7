"""Resolve a configuration to the plan of a run: defaults, `auto`, and values from the data set."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from torch import nn

from kd_lightning.config import hardware
from kd_lightning.config.checks import AVERAGES, check, single_teachers, trainer_node
from kd_lightning.config.hardware import (
    check_accelerator,
    choose_memory_format,
    choose_precision,
    device_type,
)
from kd_lightning.config.launcher import find_launcher, uses_several
from kd_lightning.config.naming import config_key
from kd_lightning.config.nodes import Node, build, find_target, without
from kd_lightning.config.plan import (
    CachePlan,
    DataPlan,
    Plan,
    TeacherPlan,
    TrainerPlan,
    TrainingPlan,
)
from kd_lightning.config.pretrained import initial_weights, with_own_input
from kd_lightning.config.stored import student_data, student_model
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.views import Normalization
from kd_lightning.errors import InputError

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
        "stored_size",
        "streamed",
        "workers",
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
    config = {**config, "student": with_own_input(config["student"], "student", config["data"])}
    node = student_data(config)
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
            initial=initial_weights(config["student"], "student"),
        ),
        teachers=tuple(_resolve_teacher(part) for part in single_teachers(config))
        if needs_teacher(config)
        else (),
        member_terms=tuple(part["method"]["terms"] for part in single_teachers(config)),
        average=config["teacher"].get("average", AVERAGES[0]),
        teacher_name=config["teacher"]["name"],
        teacher_models=tuple(part["teacher"]["model"] for part in single_teachers(config)),
        data=data_plan,
        cache=_resolve_cache(config),
        top_k=config["remember"].get("top_k", "auto"),
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


def _resolve_teacher(config: Node) -> TeacherPlan:
    teacher = with_own_input(config["teacher"], "teacher", config["data"])
    config = {**config, "teacher": teacher}
    settings = trainer_node(config, teacher=True)
    if isinstance(chosen := config["trainer"]["devices"], list):
        settings["devices"] = chosen[:1]  # a GPU by its number
    trainer = resolve_trainer(settings, teacher["model"], "teacher.model")
    weights = initial_weights(teacher, "teacher")
    finetune = teacher.get("finetune", False)
    return TeacherPlan(
        normalization=Normalization(
            tuple(teacher["mean"] or config["data"]["mean"]),
            tuple(teacher["std"] or config["data"]["std"]),
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
            initial=weights if finetune else None,
        ),
        cutout=teacher["cutout"],
        augmentation=teacher.get("augmentation"),
        mixing=teacher.get("mixing"),
        weights=None if finetune else weights,
        recipe=teacher_recipe(config, trainer.precision),
        outputs=Path(teacher["outputs"]) if teacher.get("outputs") else None,
        decay=teacher.get("decay"),
        image_size=_own_size(config),
    )


def _own_size(config: Node) -> int | None:
    """The size that a teacher's images are resized to; None if it is that of the data."""
    size = config["teacher"].get("image_size")
    return None if size is None or size == config["data"]["image_size"] else size


def teacher_recipe(config: Node, precision: str) -> Node:
    """The parts of a configuration that determine its teacher's weights.

    Args:
        config: complete; keys in `_NOT_OF_THE_TEACHER` are ignored.
        precision: precision that the teacher is trained in.
    """
    teacher = config["teacher"]
    trainer = without(trainer_node(config, teacher=True), *_NOT_OF_THE_TEACHER["trainer"])
    own = {key: teacher[key] for key in ("augmentation", "mixing") if teacher.get(key) is not None}
    if (size := _own_size(config)) is not None:
        own["image_size"] = size
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
    return CachePlan(root, settings["disk_gb"] * GIGABYTE, settings["dtype"])


def needs_teacher(config: Node) -> bool:
    """Whether any term of the method needs a teacher."""
    return any(
        getattr(find_target(term["_target_"], f"method.terms.{name}"), "needs_teacher", True)
        for name, term in config["method"]["terms"].items()
    )


def check_devices(config: Node) -> None:
    """Check that the devices for student and teacher exist.

    Raises:
        InputError: see `hardware.check_accelerator`; or a launcher has started more processes than
            there are GPUs.
    """
    teachers = single_teachers(config) if needs_teacher(config) else []
    trainers = [trainer_node(config), *(trainer_node(part, teacher=True) for part in teachers)]
    for trainer, path in zip(
        trainers, ["trainer", *["teacher.trainer"] * len(teachers)], strict=True
    ):
        check_accelerator(trainer["accelerator"], trainer["devices"], path)
    launcher = find_launcher() if uses_several(config["trainer"]) else None
    kind = device_type(config["trainer"]["accelerator"])
    if launcher is not None and kind != "cpu":
        there = AcceleratorRegistry[kind]["accelerator"].auto_device_count()
        if launcher.per_node > there:
            raise InputError(
                f"{launcher.name} has started {launcher.per_node} processes on this node, which "
                f"see {there} GPU{'s' * (there != 1)}: start one process per GPU, and let each see "
                "all GPUs of the node (with srun --gpus-per-node, not --gpus-per-task)"
            )


def resolve_trainer(trainer: Node, model: Node, role: str = "student.model") -> TrainerPlan:
    """Resolve precision, memory format and the number of processes.

    Args:
        trainer: the trainer section of the configuration.
        model: `_target_` node of the model to train.
        role: its path in the configuration, for the message.
    """
    accelerator = trainer["accelerator"]
    precision = _resolve_precision(trainer, model, role)
    memory_format = {
        "auto": choose_memory_format(precision, accelerator),
        "channels_last": torch.channels_last,
        "contiguous": torch.contiguous_format,
    }[trainer["memory_format"]]
    devices, nodes = _resolve_processes(trainer)
    if devices == 1 and hardware.chosen_card is not None and device_type(accelerator) == "cuda":
        devices = [hardware.chosen_card]
    arguments = {**trainer, "devices": devices, "num_nodes": nodes}
    return TrainerPlan(
        arguments=without(arguments, "memory_format", "precision"),
        precision=precision,
        channels_last=memory_format == torch.channels_last,
        processes=(len(devices) if isinstance(devices, list) else devices) * nodes,
    )


def _resolve_processes(trainer: Node) -> tuple[int | list[int], int]:
    """The devices of each node, as their number or a list, and the number of nodes.

    Raises:
        InputError: the launcher has started a different number of processes.
    """
    devices, nodes = trainer["devices"], trainer.get("num_nodes")
    launcher = find_launcher() if uses_several(trainer) else None
    if launcher is None:
        if devices == "auto":
            kind = AcceleratorRegistry[device_type(trainer["accelerator"])]["accelerator"]
            devices = kind.auto_device_count()
        if (nodes or 1) > 1:
            raise InputError(
                f"trainer.num_nodes={nodes}: start the command on every node, with torchrun or srun"
            )
        return devices, 1
    if devices == "auto":
        devices = launcher.per_node
    per_node = len(devices) if isinstance(devices, list) else devices
    if (per_node, nodes or launcher.nodes) != (launcher.per_node, launcher.nodes):
        raise InputError(
            f"trainer.devices={per_node} and trainer.num_nodes={nodes or launcher.nodes} need "
            f"{per_node * (nodes or launcher.nodes)} processes, but {launcher.name} has started "
            f"{launcher.per_node} on each of {launcher.nodes} nodes; trainer=ddp uses all of them"
        )
    return devices, launcher.nodes


def _resolve_precision(trainer: Node, model: Node, role: str) -> str:
    precision, accelerator = trainer["precision"], trainer["accelerator"]
    if precision == "16-mixed" and device_type(accelerator) == "cpu":
        # Lightning falls back to this. Resolved here, so that records and cache keys name it.
        log.info("precision bf16-mixed: there is no 16-mixed on a CPU")
        return "bf16-mixed"
    if precision != "auto":
        return precision
    chosen = choose_precision(accelerator)
    if chosen == "bf16-mixed" and device_type(accelerator) == "cpu":
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = build(model, role)
        chosen = choose_precision(accelerator, network)
        if chosen == "32-true":
            log.info("precision 32-true: grouped convolutions are slow in bfloat16 on a CPU")
    return chosen
