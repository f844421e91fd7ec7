"""The configuration and the metrics of a run for publication: without local paths."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from kd_lightning.config.nodes import Node

FOLDERS = {"output_dir": "outputs", "data_dir": "data"}
"""Folders of the machine, and their defaults, which replace them."""

PATHS = ("root", "checkpoint", "outputs", "run", "cache_dir", "test_folder", "dirpath", "path")
"""Keys whose values are paths, even if relative."""

# An absolute path within a text, such as `file:/home/me/x`; addresses as `https://x/y` are kept.
_WITHIN = re.compile(r"(?<![\w./:])(?:file:|sqlite:)?(?:~|[A-Za-z]:)?[/\\]+(?:[^/\\\s'\",]+[/\\])+")


def published_config(config: Node) -> Node:
    """A run's configuration with every path reduced to its last part, and without its loggers.

    The student can be loaded with it.
    """
    return {key: _tidy(value, key) for key, value in config.items() if key != "logger"} | {
        key: default for key, default in FOLDERS.items() if key in config
    }


def published_metrics(metrics: Node) -> Node:
    """A run's metrics without paths, and without the state of local files (`stamps`)."""
    kept = ("class_names",)  # those of OpenImages, `/m/012`, look like paths
    left_out = ("folder", "stamps", "error")
    return {
        key: value if key in kept else _tidy(value, key)
        for key, value in metrics.items()
        if key not in left_out
    }


def _tidy(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _tidy(part, str(name)) for name, part in value.items()}
    if isinstance(value, list):
        return [_tidy(part, key) for part in value]
    if not isinstance(value, str):
        return value
    return last_part(value) if _is_path(value, key) else _WITHIN.sub("", value)


def _is_path(text: str, key: str) -> bool:
    if key in PATHS and not re.match(r"[\w.]+$|https?://", text):
        return True
    if text.startswith(("~", "./", "../")) or PureWindowsPath(text).drive:
        return True
    return PurePosixPath(text).is_absolute() or ("/" in text and _exists(text))


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def last_part(path: str) -> str:
    """`cifar.pt` of `/home/me/cifar.pt`, or of a Windows path."""
    windows = "\\" in path or bool(PureWindowsPath(path).drive)
    return (PureWindowsPath(path) if windows else PurePosixPath(path)).name
