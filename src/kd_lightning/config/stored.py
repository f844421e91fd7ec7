"""Configurations of runs, as they are stored on disk."""

from pathlib import Path
from typing import Any

import yaml

from kd_lightning.config.nodes import Node
from kd_lightning.errors import InputError

# Keys of a stored configuration that are needed to load and test its student.
NEEDED = {
    "student.model._target_": str,
    "data._target_": str,
    "data.num_classes": int,
    "data.image_size": int,
    "optimizer._target_": str,
    "trainer.accelerator": str,
    "trainer.precision": str,
    "trainer.memory_format": str,
}


def student_model(config: Node) -> Node:
    """The `_target_` node of a configuration's student, in the method's wrapper if it has one."""
    model, method = config["student"]["model"], config.get("method")
    wrapper = method.get("student_wrapper") if isinstance(method, dict) else None
    return {**wrapper, "encoder": model} if isinstance(wrapper, dict) else model


def student_data(config: Node) -> Node:
    """The data section of a configuration, with the normalisation of its student."""
    student, data = config["student"], config["data"]
    return {**data, **{key: student[key] for key in ("mean", "std") if student.get(key)}}


def read_config(folder: Path) -> Node:
    """Read `config.yaml` in the folder of a run.

    Raises:
        InputError: the file is missing or invalid.
    """
    path = folder / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        # Nested aliases can expand exponentially ("billion laughs").
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise InputError(f"{path} contains YAML aliases, which no run writes: rejected")
        config: Node = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"{folder} is not a run directory: it has no {path.name}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged and cannot be read as YAML") from error
    for key, kind in NEEDED.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise InputError(f"{path} is not the configuration of a run: {key} is {value!r}")
    return config
