"""What a run is called and where it lies: the same configuration always in the same folder.

That is what lets a command that was interrupted, or that has become part of a larger grid, find
what is already there.

    outputs/runs/<setting>/<name>        cifar10-convnet-15e-1f0c3a5b/combined-small-s0
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.nodes import Node

AXES = ("method", "student", "seed")
"""What runs of one setting may differ in: the axes of a comparison."""

# Where things lie, what they are called and whether pictures are drawn: no result depends on it.
ELSEWHERE = ("hydra", "output_dir", "data_dir", "name", "setting", "pictures")

# Keys that are younger than the first runs, with the values that mean what these runs did. They
# are left out of every hash while they have one, so that a new feature renames no run.
SINCE: dict[str, Any] = {
    "update_bn": (False, None),
    "callbacks": ({}, None),
    "teacher.ignore_keys": ([], None),
    "teacher.checkpoint_key": (None,),
}


def register() -> None:
    """Make `${setting:}` and `${name:}` known to OmegaConf."""
    OmegaConf.register_new_resolver("setting", setting, replace=True)
    OmegaConf.register_new_resolver("name", name, replace=True)


def setting(*, _root_: DictConfig) -> str:
    """Readable, with a hash of everything but the axes: `cifar10-convnet-15e-1f0c3a5b`.

    Interpolations are hashed as they are written, so that what follows from an axis, such as the
    order of the images from the seed, does not tell settings apart.
    """
    written = OmegaConf.to_container(_root_)
    assert isinstance(written, dict)
    parts = _what_counts(written, *AXES)
    readable = f"{_root_.data.name}-{_root_.teacher.name}-{_root_.trainer.max_epochs}e"
    return f"{tidy(readable)}-{_hash(parts)[:8]}"


def name(*, _root_: DictConfig) -> str:
    """`combined-small-s0`, and what else the command changed within method and student."""
    overrides = []
    if HydraConfig.initialized():
        overrides = list(HydraConfig.get().overrides.task)
    return f"{_root_.method.name}-{_root_.student.name}-s{_root_.seed}{variant(overrides)}"


def variant(overrides: list[str]) -> str:
    """What tells runs of the same method, student and seed apart: `-logit.temperature_2`.

    Args:
        overrides: of the command line, as `method.terms.logit.temperature=2`.
    """
    changes = []
    for override in sorted(overrides):
        key, _, value = override.lstrip("+~").partition("=")
        if key.startswith(("method.", "student.")) and not key.endswith(".name"):
            sign = "no-" if override.startswith("~") else ""
            changes.append(
                f"-{sign}{key.split('.', 1)[1].removeprefix('terms.')}={value}".rstrip("=")
            )
    text = tidy("".join(changes))
    return text if len(text) <= 80 else f"-{_hash(changes)[:8]}"


def config_key(config: Node, *without: str) -> str:
    """SHA-256, in hex, of everything in a configuration that its result depends on.

    Args:
        config: complete and plain.
        without: further sections that are left out.
    """
    return _hash(_what_counts(config, *without))


def _what_counts(config: Mapping[Any, Any], *without: str) -> dict[str, Any]:
    """The part of a configuration that a result depends on, less some sections."""
    parts = {key: value for key, value in config.items() if key not in (*ELSEWHERE, *without)}
    parts["remember"] = {"dtype": parts["remember"]["dtype"]}
    for path, defaults in SINCE.items():
        section, _, key = path.rpartition(".")
        if section in parts:
            parts[section] = dict(parts[section])
        node = parts.get(section, {}) if section else parts
        if key in node and node[key] in defaults:
            del node[key]
    return parts


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def tidy(text: str) -> str:
    """Nothing that a file system, a shell or Hydra's grammar could object to."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", re.sub(r"[\[\]{}'\"]", "", text))
