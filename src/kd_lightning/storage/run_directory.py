"""The files of a run, written atomically, and loading of the student from them."""

import csv
import io
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from kd_lightning.config.nodes import Node, build
from kd_lightning.config.stored import read_config, student_model
from kd_lightning.config.trust import check_trusted
from kd_lightning.errors import InputError
from kd_lightning.files import hold, read_json, write_json, write_text
from kd_lightning.models.preparing import materialize
from kd_lightning.storage.weights import load_weights, save_weights

log = logging.getLogger(__name__)

LAST = "last.ckpt"


class Checkpoint(NamedTuple):
    """A Lightning checkpoint to resume from, and its position in the training.

    Attributes:
        path: the file.
        epochs: number of complete epochs.
        steps: total number of optimizer steps.
        batches: number of processed batches in the current epoch; 0 between epochs.
    """

    path: Path
    epochs: int
    steps: int
    batches: int = 0

    @property
    def place(self) -> str:
        """Human-readable position: `epoch 3`, or `step 57 (batch 7 of epoch 4)`."""
        if self.batches:
            return f"step {self.steps} (batch {self.batches} of epoch {self.epochs + 1})"
        return f"epoch {self.epochs}"


class _WithoutAliases(yaml.SafeDumper):
    """YAML dumper without aliases, which `RunDirectory.read_config` rejects."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Fast(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """The same in C, which cannot write names that are not UTF-8."""

    ignore_aliases = _WithoutAliases.ignore_aliases


class RunDirectory:
    """The folder of one run: `config.yaml`, `metrics.json`, `history.csv`, `confusion.csv`,
    `student.safetensors`, checkpoints, and TensorBoard event files.

    Args:
        path: the folder; need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @rank_zero_only
    def write_config(self, config: Node) -> None:
        """Write the complete configuration, with interpolations resolved."""
        try:
            text = yaml.dump(config, Dumper=_Fast, sort_keys=False)
        except UnicodeEncodeError:
            text = yaml.dump(config, Dumper=_WithoutAliases, sort_keys=False)
        write_text(self.path / "config.yaml", text)

    def read_config(self) -> Node:
        """Read the configuration of the run.

        Raises:
            InputError: the file is missing or invalid.
        """
        return read_config(self.path)

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write `metrics.json`."""
        write_json(self.path / "metrics.json", metrics)

    def read_metrics(self) -> dict[str, Any]:
        """Read `metrics.json`; empty if missing or unreadable."""
        return read_json(self.path / "metrics.json")

    @rank_zero_only
    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows to `<name>.csv`; their keys are the columns."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / f"{name}.csv", text.getvalue())

    def lock(self, wait: bool = True) -> AbstractContextManager[Any]:
        """The lock of the process that executes the run; see `files.hold`."""
        return hold(self.path / ".lock", f"another process is working on {self.path.name}", wait)

    def set_aside(self, place: Path) -> Path:
        """Move all files except the lock to a new folder below `place`; return that folder.

        Args:
            place: folder for superseded runs, on any file system.
        """
        number = 1
        while (aside := place / f"{self.path.name}-{number}").exists():
            number += 1
        aside.mkdir(parents=True)
        for entry in sorted(self.path.iterdir()):
            if entry.name == "train.log":  # being written
                shutil.copyfile(entry, aside / entry.name)
            elif entry.name != ".lock":
                shutil.move(entry, aside / entry.name)
        return aside

    def checkpoint(self) -> Checkpoint | None:
        """The last checkpoint, from the end of an epoch or a graceful stop, if any.

        Raises:
            InputError: it cannot be read now, though it may be intact.
        """
        path = self.path / "checkpoints" / LAST
        if not path.exists():
            return None
        try:
            stored = io.BytesIO(path.read_bytes())
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or "out of memory"
            raise InputError(
                f"{path} cannot be read: {reason}; run the same command again once it can, "
                "or remove the file to train from the beginning"
            ) from error
        try:
            content = torch.load(stored, map_location="cpu", weights_only=True)
            loops = content["loops"]["fit_loop"]
            epochs = loops["epoch_progress"]["current"]
            begun = epochs["processed"] < epochs["ready"]
            batches = loops["epoch_loop.batch_progress"]["current"]["processed"] if begun else 0
            return Checkpoint(path, epochs["processed"], content["global_step"], batches)
        except Exception:  # torch may raise anything
            log.warning("%s is damaged; training restarts from the beginning", path)
            return None

    def drop_checkpoint(self) -> bool:
        """Remove the last checkpoint; returns whether there was one."""
        exists = (self.path / "checkpoints" / LAST).exists()
        (self.path / "checkpoints" / LAST).unlink(missing_ok=True)
        return exists

    @rank_zero_only
    def save_weights(self, model: nn.Module, name: str = "student") -> None:
        """Write a model's weights and buffers to `<name>.safetensors`."""
        save_weights(model, self.path / f"{name}.safetensors")

    def load_student(self, trust: Iterable[str] = ()) -> tuple[nn.Module, Node]:
        """Load the student, in evaluation mode, and the run's configuration.

        The student expects images (B, 3, H, W) of ``config["data"]["image_size"]`` pixels, scaled
        to [0, 1] and normalised as in `student_data(config)`.

        Args:
            trust: see `check_trusted`.

        Raises:
            InputError: a file is missing or damaged, or refers to untrusted code.
        """
        config = self.read_config()
        check_trusted(student_model(config), "student.model", trust)
        model = build(student_model(config), "student.model")
        materialize(model, config["data"]["image_size"], "student.model")
        load_weights(model, self.path / "student.safetensors")
        return model.eval(), config
