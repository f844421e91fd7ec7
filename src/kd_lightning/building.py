"""From a configuration to the objects of a run: data, teacher, module, precision."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything

from kd_lightning.checkpoints import load_checkpoint
from kd_lightning.config import Node, build, build_partial, check_node, find_target, trainer_node
from kd_lightning.data.module import ImageDataModule
from kd_lightning.distillation import DistillationModule
from kd_lightning.frozen import FrozenTeacher, Normalization
from kd_lightning.hardware import (
    check_accelerator,
    choose_memory_format,
    choose_precision,
    device_type,
)
from kd_lightning.models.preparing import materialize
from kd_lightning.schedules import build_schedule

log = logging.getLogger(__name__)

SUPERVISED = {"cross_entropy": {"_target_": "kd_lightning.losses.CrossEntropy", "weight": 1.0}}
"""The terms of plain training on the labels, as a teacher is trained."""


def build_data(config: Node) -> ImageDataModule:
    """The data module; nothing is loaded yet, but the classes are known."""
    check_node(config["data"], "data")
    return build(config["data"], "data")


def fill_in(config: Node, data: ImageDataModule) -> Node:
    """The configuration with what only the data set knows: its number of classes."""
    if config["data"].get("num_classes") is not None:
        return config
    classes = len(data.classes)

    def fill(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        node = {key: fill(value) for key, value in node.items()}
        if node.get("num_classes", classes) is None:
            node["num_classes"] = classes
        return node

    return fill(config)


def needs_teacher(config: Node) -> bool:
    """Whether any term of the method learns from a teacher."""
    return any(
        getattr(find_target(term["_target_"], f"method.terms.{name}"), "needs_teacher", True)
        for name, term in config["method"]["terms"].items()
    )


def check_devices(config: Node) -> None:
    """Check that the devices which student and teacher shall be trained on are there.

    Raises:
        InputError: see `hardware.check_accelerator`.
    """
    for teacher in (False, True) if needs_teacher(config) else (False,):
        trainer = trainer_node(config, teacher)
        path = "teacher.trainer" if teacher else "trainer"
        check_accelerator(trainer["accelerator"], trainer["devices"], path)


def resolve_precision(trainer: Node, model: Node | torch.nn.Module) -> str:
    """The precision to train in: as configured, or what the hardware is fast at with this model.

    Args:
        trainer: the trainer's settings.
        model: that is trained, or its node; then it is built, once, to look at its layers.
    """
    precision, accelerator = trainer["precision"], trainer["accelerator"]
    if precision != "auto":
        return precision
    chosen = choose_precision(accelerator)
    if chosen == "bf16-mixed" and device_type(accelerator) == "cpu":
        with torch.random.fork_rng(devices=[]):
            network = build(model, "student.model") if isinstance(model, dict) else model
        chosen = choose_precision(accelerator, network)
        if chosen == "32-true":
            log.info("precision 32-true: grouped convolutions are slow in bfloat16 on a CPU")
    return chosen


def channels_last(trainer: Node, precision: str) -> bool:
    """Whether networks and images are laid out channels-last."""
    if trainer["memory_format"] == "auto":
        best = choose_memory_format(precision, trainer["accelerator"])
        return best == torch.channels_last
    return bool(trainer["memory_format"] == "channels_last")


def normalizations(config: Node) -> tuple[Normalization, Normalization]:
    """The teacher's normalisation, and the data's."""
    data, teacher = config["data"], config["teacher"]
    given = Normalization(tuple(data["mean"]), tuple(data["std"]))
    return Normalization(
        tuple(teacher["mean"] or given.mean), tuple(teacher["std"] or given.std)
    ), given


def build_teacher(config: Node) -> FrozenTeacher:
    """The teacher's network; with the user's weights if there is a `teacher.checkpoint`."""
    settings = config["teacher"]
    model = build(settings["model"], "teacher.model")
    materialize(model, config["data"]["image_size"], "teacher.model")
    if settings["checkpoint"] is not None:
        load_checkpoint(
            model,
            Path(str(settings["checkpoint"])).expanduser(),
            settings["rename_keys"],
            settings.get("ignore_keys") or (),
            settings.get("checkpoint_key"),
        )
    expects, given = normalizations(config)
    return FrozenTeacher(model, expects=expects, given=given)


def build_module(config: Node, teacher: FrozenTeacher | None, precision: str) -> DistillationModule:
    """The student, freshly initialised from the run's seed, and the method's terms."""
    seed_everything(config["seed"], verbose=False)
    return DistillationModule(
        student=config["student"]["model"],
        terms=config["method"]["terms"],
        optimizer=config["optimizer"],
        scheduler=config["scheduler"],
        num_classes=config["data"]["num_classes"],
        image_size=config["data"]["image_size"],
        channels_last=channels_last(trainer_node(config), precision),
        teacher=teacher,
    )


def try_optimizer(optimizer: Node, scheduler: Node | None, role: str = "") -> None:
    """Build both for a single number, so that a bad value shows before anything is trained."""
    number = torch.nn.Parameter(torch.zeros(1))
    trial = build_partial(optimizer, f"{role}optimizer")([number])
    if scheduler is not None:
        build_schedule(scheduler, trial, 100, f"{role}scheduler")
