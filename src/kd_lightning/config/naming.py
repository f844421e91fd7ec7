"""Run names and folders, derived from the configuration: the same configuration always maps to
the same folder.

This is how a repeated command, or a larger grid, finds runs that are interrupted or finished.

    outputs/runs/<setting>/<name>        cifar10-convnet-15e-1f0c3a5b/combined-small-s0
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, OmegaConf

from kd_lightning.config.nodes import Node
from kd_lightning.config.overrides import override_parser
from kd_lightning.config.published import FOLDERS
from kd_lightning.files import tidy

AXES = ("method", "student", "seed")
"""The axes of a comparison: what may differ between runs of one setting."""

# Paths, names, plotting and logging: results do not depend on them.
ELSEWHERE = ("hydra", "output_dir", "data_dir", "name", "setting", "pictures", "logger")

# How a data set is read: results do not depend on it.
READING = ("streamed", "workers")

# Keys added since the first release, with the values equivalent to their absence. With such a value
# a key is left out of every hash, so that a new feature does not rename existing runs.
SINCE: dict[str, Any] = {
    "update_bn": (False, None),
    "ema": (None,),
    "callbacks": ({}, None),
    "remember.top_k": ("auto",),
    "data.augmentation": (None,),
    "data.mixing": (None,),
    "data.resize": ("squash",),
    "data.test_folder": (None,),
    "data.stored_size": (None,),
    "teacher.augmentation": (None,),
    "teacher.mixing": (None,),
    "teacher.members": (None,),
    "teacher.average": ("probabilities", None),
    "teacher.ignore_keys": ([], None),
    "teacher.checkpoint_key": (None,),
    "teacher.outputs": (None,),
    "teacher.run": (None,),
    "teacher.trust": ([], None),
    "teacher.decay": (None,),
    "teacher.pretrained": (False, None),
    "teacher.finetune": (False, None),
    "teacher.image_size": (None,),
    "student.pretrained": (False, None),
    "student.checkpoint": (None,),
    "student.checkpoint_key": (None,),
    "student.ignore_keys": ([], None),
    "student.mean": (None,),
    "student.std": (None,),
}


def register() -> None:
    """Register the OmegaConf resolvers `${setting:}`, `${name:}` and `${choose:...}`."""
    OmegaConf.register_new_resolver("setting", setting, replace=True)
    OmegaConf.register_new_resolver("name", name, replace=True)
    OmegaConf.register_new_resolver("choose", choose, replace=True)


def setting(*, _root_: DictConfig) -> str:
    """Human-readable, with a hash of everything except the axes: `cifar10-convnet-15e-1f0c3a5b`.

    Interpolations are hashed unresolved, so that a value derived from an axis, such as the seed of
    the image order, does not change the setting.
    """
    # Not `to_container(_root_)`: most of it would be Hydra's own settings.
    nodes: dict[Any, Any] = {
        key: _root_._get_node(key) for key in _root_ if key not in (*ELSEWHERE, *AXES)
    }
    written = {
        key: OmegaConf.to_container(node) if isinstance(node, Container) else node._value()
        for key, node in nodes.items()
    }
    parts = _what_counts(written)
    readable = f"{_root_.data.name}-{_root_.teacher.name}-{_root_.trainer.max_epochs}e"
    return f"{tidy(readable)}-{_hash(parts)[:8]}"


def name(*, _root_: DictConfig) -> str:
    """`combined-small-s0`, plus the command's other overrides of method and student."""
    overrides = []
    if HydraConfig.initialized():
        overrides = list(HydraConfig.get().overrides.task)
    return run_name(_root_, overrides)


def choose(key: Any, values: Mapping[Any, Any], default: Any) -> Any:
    """`${choose:${student.name},{small: 0.1},0.05}`: a value that depends on another."""
    return values.get(key, default)


def run_name(config: DictConfig, overrides: list[str]) -> str:
    """Name of the run with this configuration and these command-line overrides."""
    axes = f"{tidy(str(config.method.name))}-{tidy(str(config.student.name))}-s{config.seed}"
    return axes + variant(overrides)


def variant(overrides: list[str]) -> str:
    """Suffix that distinguishes runs of one method, student and seed: `-logit.temperature_2`.

    Args:
        overrides: command-line overrides, e.g. `method.terms.logit.temperature=2`.
    """
    changes = []
    named = any(override.lstrip("+").startswith("student.name=") for override in overrides)
    for override in sorted(map(_spelt, overrides)):
        key, _, value = override.lstrip("+~").partition("=")
        if key == "student.model.model_name" and not named:
            continue  # is the student's name
        if key in ("method", "student") and value.startswith("{"):
            changes.append(f"-{value}")
        elif key.startswith(("method.", "student.")) and key not in ("method.name", "student.name"):
            sign = "no-" if override.startswith("~") else ""
            changes.append(
                f"-{sign}{key.split('.', 1)[1].removeprefix('terms.')}={value}".rstrip("=")
            )
    text = tidy("".join(changes))
    return text if len(text) <= 80 else f"-{_hash(changes)[:8]}"


@functools.lru_cache(maxsize=1024)
def _spelt(override: str) -> str:
    """An override in one spelling, whether it is as typed or as Hydra's sweeper writes it: numbers
    as the sweeper does (`1e3` as `1000.0`), `true` and `false` as in YAML.
    """
    if override.startswith("~"):
        return override.removesuffix("=null")
    try:
        parsed = override_parser().parse_override(override)
    except (HydraException, ValueError, TypeError):  # reported elsewhere
        return override
    text = parsed.get_value_element_as_str()
    value = re.sub(r"\b(True|False)\b", lambda found: found[0].lower(), text)
    return f"{parsed.get_key_element()}={value}"


def config_key(config: Node, *without: str) -> str:
    """SHA-256, in hex, of the parts of a configuration that determine its result.

    Args:
        config: complete, as plain dictionaries.
        without: further sections to leave out.
    """
    return _hash(_what_counts(_in_default_folder(config), *without))


def _in_default_folder(config: Node) -> Node:
    """The configuration as if the data were in the default `data_dir`: results do not depend on
    where they are.
    """
    data = dict(config["data"])
    if "cache_dir" in data:
        data["cache_dir"] = f"{FOLDERS['data_dir']}/decoded"
    elif data.get("root") == config["data_dir"]:  # of a download, not of someone's images
        data["root"] = FOLDERS["data_dir"]
    return {**config, "data": data}


def _what_counts(config: Mapping[Any, Any], *without: str) -> dict[str, Any]:
    """The parts of a configuration that determine its result, except some sections."""
    parts = {key: value for key, value in config.items() if key not in (*ELSEWHERE, *without)}
    if "teacher" in parts:
        parts["teacher"] = _without_place(parts["teacher"])
    trainer = parts.get("trainer")
    if isinstance(trainer, Mapping) and isinstance(trainer.get("devices"), list):
        # Which GPUs does not affect the result, only how many.
        parts["trainer"] = {**trainer, "devices": len(trainer["devices"])}
    if isinstance(parts.get("data"), dict):
        parts["data"] = {k: v for k, v in parts["data"].items() if k not in READING}
    if isinstance(remember := parts.get("remember"), Mapping):
        parts["remember"] = {k: v for k, v in remember.items() if k in ("dtype", "top_k")}
    for path, defaults in SINCE.items():
        section, _, key = path.rpartition(".")
        node = parts.get(section) if section else parts
        if not isinstance(node, dict):
            continue  # there is none, or it is invalid, which is reported later
        if section:
            node = parts[section] = dict(node)
        if key in node and node[key] in defaults:
            del node[key]
    return parts


def _without_place(teacher: Node) -> Node:
    """A teacher's section without the file that `teacher.run` was completed with."""
    if isinstance(teacher.get("members"), list):
        members = [_without_place(m) if isinstance(m, dict) else m for m in teacher["members"]]
        teacher = {**teacher, "members": members}
    if isinstance(teacher.get("run"), dict):
        return {key: value for key, value in teacher.items() if key != "checkpoint"}
    return teacher


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
