"""Loggers of a training: construction from the configuration, continuation by a resumed training,
and images.
"""

import csv
import importlib
import os
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from kd_lightning.config.nodes import Node, build, find_target, takes
from kd_lightning.errors import InputError
from kd_lightning.files import read_json, write_json
from kd_lightning.storage.run_directory import Checkpoint

TENSORBOARD: Mapping[str, Node] = {
    "tensorboard": {"_target_": "lightning.pytorch.loggers.TensorBoardLogger"}
}
"""The default."""

IDS = "loggers.json"
"""File in the run folder: logger name to the id of the run on its server."""


class ContinuedCSVLogger(CSVLogger):
    """Writes `csv/metrics.csv` below a folder. A resumed training continues the file, where
    Lightning's logger would overwrite it.

    Args:
        save_dir: folder of the run.
        purge_step: step that the training resumes at; rows of later ones are dropped. None: a new
            training.
    """

    def __init__(self, save_dir: str | Path, purge_step: int | None = None) -> None:
        super().__init__(save_dir, name="csv", version="")
        self._purge_step = purge_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, with the rows of the interrupted training written again."""
        if self._experiment is None:
            rows = self._earlier_rows()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
                writer: Any = super().experiment  # deletes the file
            writer.metrics = rows
            writer.save()
        return self._experiment

    def _earlier_rows(self) -> list[dict[str, Any]]:
        if self._purge_step is None:
            return []
        try:
            with Path(self.log_dir, "metrics.csv").open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError):
            return []
        return [row for row in rows if _step(row) < self._purge_step]


def _step(row: Mapping[str, Any]) -> float:
    """The step of a row; that of a row that was not written completely is unknown."""
    try:
        return int(row["step"])
    except (KeyError, TypeError, ValueError):
        return float("inf")


def build_loggers(
    nodes: Mapping[str, Node], folder: Path, name: str, resume: Checkpoint | None = None
) -> list[Logger]:
    """Build loggers from their `_target_` nodes.

    What a node does not set is chosen here: files are written below `folder`, and a resumed
    training continues what it has logged.

    Args:
        nodes: name to node.
        folder: folder of the run.
        name: human-readable name of the training.
        resume: checkpoint that the training resumes from.

    Raises:
        InputError: one cannot be built, or is not a logger.
    """
    return [_build(key, node, folder, name, resume) for key, node in nodes.items()]


def _build(key: str, node: Node, folder: Path, name: str, resume: Checkpoint | None) -> Logger:
    path, target = f"logger.{key}", find_target(node["_target_"], f"logger.{key}")
    kind = target if isinstance(target, type) else object
    given: Node = {"save_dir": str(folder)} if takes(node, "save_dir", path) else {}
    steps = resume.steps if resume else None
    if issubclass(kind, TensorBoardLogger):
        given |= {"name": "", "version": "", "default_hp_metric": False, "purge_step": steps}
    elif issubclass(kind, ContinuedCSVLogger):
        given["purge_step"] = steps
    elif issubclass(kind, WandbLogger):
        # Ids of deleted runs cannot be used again, so a new training has a new one.
        known = _read_id(folder, key, resume) or secrets.token_hex(4)
        _write_id(folder, key, known)
        given |= {"name": name, "id": known}
    elif issubclass(kind, MLFlowLogger):
        if cast(Any, rank_zero_only).rank:
            return DummyLogger()  # only one process may create the tables of a database
        given |= {"run_name": name, "run_id": _read_id(folder, key, resume)}
    logger = build({**node, **{k: v for k, v in given.items() if k not in node}}, path)
    if not isinstance(logger, Logger):
        raise InputError(
            f"{path} must be a lightning.pytorch.loggers.Logger, not {node['_target_']}"
        )
    if isinstance(logger, MLFlowLogger):
        _write_id(folder, key, logger.run_id)  # MLflow chooses it
    return logger


def check_login(nodes: Mapping[str, Node]) -> None:
    """Check that there is an account for Weights & Biases, without connecting to it.

    Args:
        nodes: name to node.

    Raises:
        InputError: there is none, and the logger is not offline.
    """
    for key, node in nodes.items():
        kind = find_target(node["_target_"], f"logger.{key}")
        if not isinstance(kind, type) or not issubclass(kind, WandbLogger):
            continue
        online = os.environ.get("WANDB_MODE", "online") in ("online", "shared")
        if online and not node.get("offline") and not cast(Any, rank_zero_only).rank:
            try:
                importlib.import_module("wandb").login()
            except Exception as error:  # on a terminal it asks for the key
                raise InputError(
                    f"logger.{key}: {str(error).rstrip('.')}; or set logger.{key}.offline=true"
                ) from error


def _read_id(folder: Path, key: str, resume: Checkpoint | None) -> str | None:
    known = read_json(folder / IDS).get(key) if resume is not None else None
    return known if isinstance(known, str) else None


@rank_zero_only
def _write_id(folder: Path, key: str, known: str | None) -> None:
    write_json(folder / IDS, {**read_json(folder / IDS), key: known})


@contextmanager
def closing(loggers: Sequence[Logger]) -> Iterator[None]:
    """End the runs of Weights & Biases with the block.

    A process has at most one active run there, and without this the next training, such as that of
    the student after its teacher, would be logged into it.
    """
    try:
        yield
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger) and logger._experiment is not None:
                logger._experiment.finish()


def shows_images(loggers: Iterable[Logger]) -> bool:
    """Whether any of the loggers can show images."""
    return any(isinstance(logger, TensorBoardLogger | WandbLogger) for logger in loggers)


def log_image(
    loggers: Iterable[Logger], name: str, image: "np.ndarray[Any, Any]", step: int = 0
) -> None:
    """Log an image to TensorBoard and Weights & Biases; other loggers are skipped.

    Args:
        loggers: of the training.
        name: title of the image.
        image: (height, width, 3), uint8, or in [0, 1].
        step: position of the image among those of the same name.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, image, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            pixels = image if image.dtype == np.uint8 else (255 * image).round().astype(np.uint8)
            logger.log_image(name, [pixels])
