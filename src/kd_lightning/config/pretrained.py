"""Weights that a network starts from, and the input that pretrained ones expect: the keys
`checkpoint`, `pretrained`, `mean`, `std` and `image_size` of the sections student and teacher.
"""

import logging
from pathlib import Path

from kd_lightning.config.nodes import Node, find_target, without
from kd_lightning.config.plan import CheckpointPlan, PretrainedPlan
from kd_lightning.errors import InputError
from kd_lightning.models.named import Pretrained, pretrained_settings

log = logging.getLogger(__name__)

WRAPPED = {"module.": ""}
"""Default of `student.rename_keys`, as of the teacher's: the prefix of `DataParallel`."""


def initial_weights(section: Node, role: str) -> CheckpointPlan | PretrainedPlan | None:
    """The weights of a section, student or teacher; None: initialised randomly."""
    if section.get("pretrained"):
        return PretrainedPlan(role)
    if section.get("checkpoint") is None:
        return None
    return CheckpointPlan(
        path=Path(str(section["checkpoint"])).expanduser(),
        rename_keys=section.get("rename_keys", WRAPPED) or {},
        ignore_keys=tuple(section.get("ignore_keys") or ()),
        key=section.get("checkpoint_key"),
        role=role,
    )


def with_own_input(section: Node, role: str, data: Node) -> Node:
    """A section in which the normalisation and, of a teacher, the image size are those of its
    pretrained weights, unless given.

    Args:
        section: the section student or teacher.
        role: its name.
        data: the data section.

    Raises:
        InputError: the model has no pretrained weights, or they are for other classes and not
            fine-tuned.
    """
    if not section.get("pretrained"):
        return section
    own = _settings(section, role)
    classes = data["num_classes"]
    frozen = role == "teacher" and not section.get("finetune")
    if frozen and own.num_classes != classes:
        raise InputError(
            f"{role}.pretrained: the weights of {own.name} are for {own.num_classes} classes, the "
            f"data has {classes}: train them on the data first with {role}.finetune=true"
        )
    found = {
        "mean": section.get("mean") or list(own.mean),
        "std": section.get("std") or list(own.std),
    }
    if role == "teacher":
        return {**section, **found, "image_size": section.get("image_size") or own.image_size}
    if own.image_size != data["image_size"]:
        log.warning(
            "student.pretrained: the weights of %s are for images of %d pixels, data.image_size "
            "is %d", own.name, own.image_size, data["image_size"],
        )  # fmt: skip
    return {**section, **found}


def _settings(section: Node, role: str) -> Pretrained:
    model = section["model"]
    builder = find_target(model["_target_"], f"{role}.model")
    try:
        return pretrained_settings(builder, without(model, "_target_"))
    except InputError:
        raise
    except Exception as error:  # timm may raise anything
        raise InputError(f"{role}.pretrained: {error}") from error
