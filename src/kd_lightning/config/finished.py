"""Lookup of the finished run of a configuration."""

import glob
from pathlib import Path
from typing import Any

from kd_lightning.config.naming import config_key
from kd_lightning.config.nodes import Node
from kd_lightning.errors import InputError
from kd_lightning.files import read_json


def finished(run_dir: Path, config: Node) -> dict[str, Any] | None:
    """The metrics of this run if it is already finished.

    Its input files may have changed since; see `storage.identity.unchanged`.

    Raises:
        InputError: the folder contains a finished run of another configuration.
    """
    metrics = read_json(run_dir / "metrics.json")
    if metrics.get("status") != "finished":
        return None
    if metrics.get("config_key") != config_key(config):
        raise InputError(
            f"{run_dir} contains a finished run of another configuration; choose another name=... "
            "or hydra.run.dir=..."
        )
    return metrics


def finished_elsewhere(run_dir: Path, config: Node) -> dict[str, Any] | None:
    """The metrics of an equivalent finished run in another setting: one that differs only in the
    configured teacher, which neither run uses.

    Its input files may have changed since, as in `finished`. None if there are already metrics in
    `run_dir`.

    Args:
        run_dir: the folder of the requested run.
        config: complete, as plain dictionaries.

    Returns:
        The metrics and the other run's ``folder``.
    """
    if (run_dir / "metrics.json").exists():
        return None
    runs = Path(config["output_dir"]) / "runs"
    key = ""
    for path in sorted(runs.glob(f"*/{glob.escape(config['name'])}/metrics.json")):
        metrics = read_json(path)
        if metrics.get("status") == "finished" and "key_without_teacher" in metrics:
            key = key or config_key(config, "teacher")
            if metrics["key_without_teacher"] == key:
                return {**metrics, "folder": str(path.parent)}
    return None
