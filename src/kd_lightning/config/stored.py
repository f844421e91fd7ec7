"""Configurations of runs, as they are stored on disk."""

import re
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


# Escapes of lone surrogates, by which Python represents names that are not UTF-8.
_NOT_UTF_8 = re.compile(r"\\u[dD][89a-fA-F]")
_DEEPEST = 50  # levels of nesting; no run writes more


class UnusualYAMLError(ValueError):
    """YAML that no run writes; the message says why."""


def parse_yaml(text: str) -> Any:
    """Parse YAML that a run wrote, which has neither aliases nor deep nesting.

    Raises:
        UnusualYAMLError: the text has either.
        yaml.YAMLError, ValueError, TypeError: the text is not YAML.
    """
    loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
    if _NOT_UTF_8.search(text):  # which the fast loader does not read
        loader = yaml.SafeLoader
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):  # can expand exponentially ("billion laughs")
            raise UnusualYAMLError("contains YAML aliases, which no run writes: rejected")
        if depth > _DEEPEST:  # the fast loader would crash
            raise UnusualYAMLError("is nested too deeply: rejected")
    return yaml.load(text, Loader=loader)


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
        config: Node = parse_yaml(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder} is not a run directory: it has no {path.name}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnusualYAMLError as error:
        raise InputError(f"{path} {error}") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged and cannot be read as YAML") from error
    for key, kind in NEEDED.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise InputError(f"{path} is not the configuration of a run: {key} is {value!r}")
    return config
