"""Validation of a composed configuration, before data is loaded or a teacher trained.

Hydra composes values without validating them. Two rules do most of the work: a `_target_` node
must match the signature of its target, in names and types, and every number must be finite.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from kd_lightning.config.initial import check_initial
from kd_lightning.config.loggers import check_loggers
from kd_lightning.config.nodes import Node, check_node, select, unknown_key, without
from kd_lightning.errors import InputError

# Required keys that are not arguments of a `_target_`.
KEYS: dict[str, set[str]] = {
    "": {
        "seed", "output_dir", "data_dir", "setting", "name",
        "method", "student", "teacher", "data", "trainer", "optimizer", "scheduler", "remember",
    },
    "method": {"name", "terms"},
    "student": {"name", "model", "layers"},
    "teacher": {
        "name", "model", "layers", "checkpoint", "rename_keys", "mean", "std",
        "cutout", "seed", "trainer", "optimizer", "scheduler",
    },
    "remember": {"disk_gb", "dtype"},
}  # fmt: skip
TRAINER = (
    "accelerator", "devices", "precision", "memory_format", "max_epochs", "log_every_n_steps",
)  # fmt: skip
"""Keys of `trainer` that are read here; others are arguments of Lightning's Trainer."""
OPTIONAL: dict[str, set[str]] = {
    "remember": {"top_k"},
    "method": {"student_wrapper"},
    "student": {
        "checkpoint",
        "checkpoint_key",
        "rename_keys",
        "ignore_keys",
        "pretrained",
        "mean",
        "std",
    },
    "": {"callbacks", "logger", "pictures", "update_bn", "ema"},
    "teacher": {
        "pretrained",
        "finetune",
        "image_size",
        "checkpoint_key",
        "ignore_keys",
        "augmentation",
        "mixing",
        "members",
        "average",
        "outputs",
        "run",
        "trust",
        "decay",
    },
}
"""Optional keys: older runs lack them, and some are not in the configuration tree."""

TOTAL_STEPS = ("total_steps", "num_training_steps")
"""Parameter names for the total number of optimizer steps, in torch and in transformers."""

NAMES = ("setting", "name", "method.name", "student.name", "teacher.name", "data.name")

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
ROUNDINGS = ("float16", "bfloat16", "float32")
STRATEGIES = ("auto", "ddp")
AVERAGES = ("probabilities", "logits")
MEMORY_FORMATS = ("auto", "channels_last", "contiguous")


def check(config: Node) -> None:
    """Check everything that can be checked without data, teacher or weights.

    The data node is skipped: it has already been checked and built, to get the classes.

    Raises:
        InputError: a value is invalid; the message names the key and the valid values.
    """
    check_sections(config)
    for path, number in _numbers(config):
        if not math.isfinite(number):
            raise InputError(f"{path} must be a finite number, not {number}")
    seeds = [f"data.{key}" for key in config["data"] if key == "seed" or key.endswith("_seed")]
    for path in seeds:
        _check_seed(select(config, path), path)
    remember = config["remember"]
    if not _is_number(remember["disk_gb"]) or remember["disk_gb"] < 0:
        raise InputError(
            f"remember.disk_gb must be a number of at least 0, not {remember['disk_gb']}"
        )
    if remember["dtype"] not in ROUNDINGS:
        raise InputError(
            f"remember.dtype must be one of {', '.join(ROUNDINGS)}, not {remember['dtype']}"
        )
    top_k = remember.get("top_k", "auto")
    if top_k not in ("auto", None) and not (_is_integer(top_k) and top_k >= 1):
        raise InputError(
            f"remember.top_k must be auto, null or a whole number of at least 1, not {top_k}"
        )
    if not isinstance(config["pictures"], bool):
        raise InputError(f"pictures must be true or false, not {config['pictures']}")
    for path in ("output_dir", "data_dir"):
        if not isinstance(config[path], str) or not config[path]:
            raise InputError(f"{path} must be the path of a folder, not {config[path]!r}")
    _check_cutout(config["data"], "data")
    if not config["method"]["terms"]:
        raise InputError("method.terms must name at least one term")
    for name, term in config["method"]["terms"].items():
        weight: Any = term.get("weight") if isinstance(term, dict) else None
        if not _is_number(weight) or weight < 0:
            raise InputError(
                f"method.terms.{name}.weight must be a number of at least 0, not {weight}"
            )
        check_node(without(term, "weight"), f"method.terms.{name}")
    check_node(config["student"]["model"], "student.model")
    check_initial(config["student"], "student")
    if config["student"].get("pretrained") and config["method"].get("student_wrapper"):
        raise InputError(
            f"student.pretrained cannot be used with method={config['method']['name']}, which "
            "replaces the student's classifier"
        )
    if (wrapper := config["method"].get("student_wrapper")) is not None:
        check_node(wrapper, "method.student_wrapper", {"encoder"})
        if len(config["teacher"].get("members") or ()) > 1:
            raise InputError(
                f"method={config['method']['name']} reuses the classifier of a teacher, but "
                "teacher.members names several: choose one teacher"
            )
    if not isinstance(config.get("update_bn", False), bool):
        raise InputError(f"update_bn must be true or false, not {config['update_bn']}")
    ema: Any = config.get("ema")
    if ema is not None and not (_is_number(ema) and 0 < ema < 1):
        raise InputError(f"ema must be null or a decay above 0 and below 1, as 0.999, not {ema}")
    callbacks = config.get("callbacks") or {}
    if not isinstance(callbacks, dict):
        raise InputError(f"callbacks must be names with a _target_ node each, not {callbacks!r}")
    for name, callback in callbacks.items():
        check_node(callback, f"callbacks.{name}")
    check_loggers(config.get("logger") or {})
    check_trainer(trainer_node(config), "trainer")
    _check_optimizer(config)
    if config["teacher"].get("average", AVERAGES[0]) not in AVERAGES:
        raise InputError(
            f"teacher.average must be one of {', '.join(AVERAGES)}, not "
            f"{config['teacher']['average']}"
        )
    several = config["teacher"].get("members") is not None
    for number, part in enumerate(single_teachers(config)):
        _check_teacher(part, f"teacher.members[{number}]" if several else "teacher")


def _check_cutout(section: Node, path: str) -> None:
    """Check that the cutout is not one that an augmentation node replaces."""
    if section.get("cutout") and section.get("augmentation") is not None:
        raise InputError(
            f"{path}.cutout={section['cutout']} has no effect, since {path}.augmentation renders "
            f"the views; set {path}.augmentation.cutout, if it has one"
        )


def _check_teacher(config: Node, path: str) -> None:
    """Check the teacher section, or that of a member, at a path."""
    teacher = config["teacher"]
    _check_seed(teacher["seed"], f"{path}.seed")
    if not _is_integer(teacher["cutout"]) or teacher["cutout"] < 0:
        raise InputError(f"{path}.cutout must be 0 or more pixels, not {teacher['cutout']}")
    check_initial(teacher, path)
    if teacher.get("outputs") is not None and teacher["checkpoint"] is not None:
        raise InputError(f"{path}.checkpoint cannot be used with {path}.outputs: omit one of them")
    decay: Any = teacher.get("decay")
    if decay is not None and config["method"].get("student_wrapper") is not None:
        raise InputError(
            f"method={config['method']['name']} reuses the classifier of a teacher, but "
            f"{path}.decay makes the student its own teacher: choose another teacher"
        )
    if decay is not None and not (_is_number(decay) and 0 < decay < 1):
        raise InputError(f"{path}.decay must be above 0 and below 1, as 0.999, not {decay}")
    if decay is not None and (path != "teacher" or teacher["checkpoint"] is not None):
        raise InputError(
            f"{path}.decay: a teacher that follows the student has no checkpoint, and cannot be in "
            "an ensemble"
        )
    check_node(teacher["model"], f"{path}.model")
    for key in ("augmentation", "mixing"):
        if (node := teacher.get(key)) is not None:
            check_node(node, f"{path}.{key}")
    _check_cutout(teacher, path)
    trainer = trainer_node(config, teacher=True)
    check_trainer(trainer, f"{path}.trainer")
    if trainer["devices"] != 1:
        raise InputError(f"{path}.trainer.devices must be 1: one process trains a teacher")
    _check_optimizer(teacher, f"{path}.")


def _check_optimizer(section: Node, prefix: str = "") -> None:
    check_node(section["optimizer"], f"{prefix}optimizer", {"params"})
    if section["scheduler"] is not None:
        check_node(section["scheduler"], f"{prefix}scheduler", {"optimizer", *TOTAL_STEPS})


def _check_seed(seed: Any, path: str) -> None:
    if not _is_integer(seed) or not 0 <= seed < 2**32:
        raise InputError(f"{path} must be a whole number from 0 to 2^32 - 1, not {seed}")


def check_sections(config: Node) -> None:
    """Check the keys outside of `_target_` nodes; needs no heavy imports.

    Raises:
        InputError: a key is unknown or missing.
    """
    config.setdefault("pictures", True)
    for section, required in KEYS.items():
        node = config[section] if section else config
        _check_section(node, section, required, OPTIONAL.get(section, set()))
    for path in NAMES:
        if not isinstance(name := select(config, path), str) or not name:
            raise InputError(f"{path} must be a name, not {_named(name)}")
    _check_seed(config["seed"], "seed")
    for section in ("trainer", "method.terms", "teacher.trainer", "data"):
        if not isinstance(node := select(config, section), dict):
            raise InputError(f"{section} must be a dictionary, not {node!r}")
    for key in TRAINER:
        if key not in config["trainer"]:
            raise InputError(
                f"trainer.{key} must be given; a file of your own begins with "
                "defaults: [auto, _self_]"
            )
    members = config["teacher"].get("members") or ()
    if not isinstance(members, list | tuple):
        raise InputError(f"teacher.members must be a list of teachers, not {members!r}")
    for number, member in enumerate(members):
        path, optional = f"teacher.members[{number}]", OPTIONAL["teacher"] | {"terms"}
        _check_section(member, path, KEYS["teacher"], optional)


def _check_section(node: Any, section: str, required: set[str], optional: set[str]) -> None:
    if not isinstance(node, dict):
        raise InputError(f"{section} must be a dictionary, not {node!r}")
    if "scheduler" in required:
        node.setdefault("scheduler", None)  # `scheduler=null`: a constant learning rate
    for key in node:
        if key not in required | optional:
            known = required | optional
            raise InputError(unknown_key(f"{section}.{key}".lstrip("."), known, section))
    for key in sorted(required - node.keys()):
        raise InputError(f"{section}.{key} must be given".lstrip("."))


def check_trainer(trainer: Node, path: str) -> None:
    """Check the arguments of Lightning's Trainer, and our own `precision` and `memory_format`."""
    for key, choices in (("precision", PRECISIONS), ("memory_format", MEMORY_FORMATS)):
        if trainer[key] not in choices:
            raise InputError(
                f"{path}.{key} must be one of {', '.join(choices)}, not {trainer[key]}"
            )
    for key in ("max_epochs", "log_every_n_steps"):
        if not _is_integer(trainer[key]) or trainer[key] < 1:
            raise InputError(
                f"{path}.{key} must be a whole number of at least 1, not {_named(trainer[key])}"
            )
    devices = trainer["devices"]
    if devices != "auto" and not _are_devices(devices):
        raise InputError(
            f"{path}.devices must be a whole number of at least 1, or auto, or the numbers of GPUs "
            f"as in [0,2], not {devices}"
        )
    if trainer.get("strategy", "auto") not in STRATEGIES:
        raise InputError(
            f"{path}.strategy must be one of {', '.join(STRATEGIES)}, not {trainer['strategy']}"
        )
    nodes = trainer.get("num_nodes", 1)
    if not _is_integer(nodes) or nodes < 1:
        raise InputError(f"{path}.num_nodes must be a whole number of at least 1, not {nodes}")
    check_node(without(trainer, "memory_format", "precision"), path)


def single_teachers(config: Node) -> list[Node]:
    """The configuration, or for an ensemble one with each member as its only teacher."""
    members = config["teacher"].get("members")
    if members is None:
        return [config]
    return [
        {
            **config,
            "teacher": without(member, "terms"),
            "method": {
                **config["method"], "terms": member.get("terms", config["method"]["terms"])
            },
        }
        for member in members
    ]  # fmt: skip


def trainer_node(config: Node, teacher: bool = False) -> Node:
    """The trainer section; the teacher's is the run's, overridden by `teacher.trainer`.

    A teacher is always trained by one process, so that its weights do not depend on the number of
    processes that train the student.
    """
    if not teacher:
        return dict(config["trainer"])
    return {**of_one_process(config["trainer"]), **config["teacher"]["trainer"]}


def of_one_process(trainer: Node) -> Node:
    """A trainer section without what distributes the training over several processes."""
    return {**without(trainer, "strategy", "num_nodes"), "devices": 1}


def _numbers(node: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _numbers(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _numbers(value, f"{path}[{index}]")
    elif isinstance(node, float):
        yield path, node


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_devices(value: Any) -> bool:
    """Whether a value is a number of devices, or a list of different numbers of GPUs."""
    if isinstance(value, list):
        numbers = [number for number in value if _is_integer(number) and number >= 0]
        return 0 < len(value) == len({*numbers})
    return _is_integer(value) and value >= 1


def _named(value: Any) -> str:
    """Format a value for a message; an empty string becomes `empty`, None `null`."""
    return "null" if value is None else "empty" if value == "" else str(value)
