"""What a run leaves behind, written atomically, and how a model is rebuilt from it."""

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
from kd_lightning.errors import InputError
from kd_lightning.files import hold, read_json, write_json, write_text
from kd_lightning.models.preparing import materialize
from kd_lightning.storage.trust import check_trusted
from kd_lightning.storage.weights import load_weights, save_weights

log = logging.getLogger(__name__)

LAST = "last.ckpt"

# Of a configuration in a file, what a student is rebuilt and tested by.
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


class Checkpoint(NamedTuple):
    """Where a training can go on: Lightning's file, and how far it had come.

    Attributes:
        path: the file.
        epochs: that were whole.
        steps: in all.
        batches: of the epoch that had begun; 0 between two epochs.
    """

    path: Path
    epochs: int
    steps: int
    batches: int = 0

    @property
    def place(self) -> str:
        """For people: `epoch 3`, or `step 57 (batch 7 of epoch 4)`."""
        if self.batches:
            return f"step {self.steps} (batch {self.batches} of epoch {self.epochs + 1})"
        return f"epoch {self.epochs}"


class _WithoutAliases(yaml.SafeDumper):
    """Writes what is there twice, twice; `RunDirectory.read_config` says why."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class RunDirectory:
    """The folder of one run: `config.yaml`, `metrics.json`, `history.csv`, `confusion.csv`,
    `student.safetensors`, checkpoints for resuming, and TensorBoard's events.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @rank_zero_only
    def write_config(self, config: Node) -> None:
        """Store the complete configuration, interpolations resolved."""
        text = yaml.dump(config, Dumper=_WithoutAliases, sort_keys=False)
        write_text(self.path / "config.yaml", text)

    def read_config(self) -> Node:
        """The configuration of the run.

        Raises:
            InputError: there is none, or it is not a configuration.
        """
        path = self.path / "config.yaml"
        try:
            text = path.read_text(encoding="utf-8")
            # Aliases of aliases of aliases are a small file and more settings than there are atoms.
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
                raise InputError(f"{path} has YAML aliases in it, which no run writes: refused")
            config = yaml.safe_load(text)
        except OSError as error:
            raise InputError(f"{self.path} is not a run directory: no {path.name} in it") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{path} is damaged and cannot be read as YAML") from error
        for key, kind in NEEDED.items():
            value = config
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if not isinstance(value, kind):
                raise InputError(f"{path} is not the configuration of a run: {key} is {value!r}")
        return config

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Replace `metrics.json`."""
        write_json(self.path / "metrics.json", metrics)

    def read_metrics(self) -> dict[str, Any]:
        """The metrics as far as they are known; empty if there are none that can be read."""
        return read_json(self.path / "metrics.json")

    @rank_zero_only
    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace `<name>.csv` by these rows; their keys are the columns."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / f"{name}.csv", text.getvalue())

    def lock(self, wait: bool = True) -> AbstractContextManager[Any]:
        """Held by the process that is working on the run; see `files.hold`."""
        return hold(self.path / ".lock", f"another process is working on {self.path.name}", wait)

    def set_aside(self, place: Path) -> Path:
        """Move everything but the lock to a new folder below `place`; return that folder.

        Args:
            place: where earlier runs are kept; on any file system.
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
        """What was saved last, the end of an epoch or where it was asked to stop, if anything."""
        path = self.path / "checkpoints" / LAST
        if not path.exists():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            loops = content["loops"]["fit_loop"]
            epochs = loops["epoch_progress"]["current"]
            begun = epochs["processed"] < epochs["ready"]
            batches = loops["epoch_loop.batch_progress"]["current"]["processed"] if begun else 0
            return Checkpoint(path, epochs["processed"], content["global_step"], batches)
        except Exception:  # torch raises many kinds
            log.warning("%s is damaged: training begins anew", path)
            return None

    @rank_zero_only
    def save_weights(self, model: nn.Module, name: str = "student") -> None:
        """Store a model's weights and buffers as `<name>.safetensors`."""
        save_weights(model, self.path / f"{name}.safetensors")

    def load_student(self, trust: Iterable[str] = ()) -> tuple[nn.Module, Node]:
        """Rebuild the student, in evaluation mode, and return it with the run's configuration.

        It expects images (B, 3, H, W) of ``config["data"]["image_size"]`` pixels, scaled to [0, 1]
        and then normalised by ``config["data"]["mean"]`` and ``["std"]``.

        Args:
            trust: see `check_trusted`.

        Raises:
            InputError: something is missing or damaged, or names code that is not trusted.
        """
        config = self.read_config()
        check_trusted(config["student"]["model"], "student.model", trust)
        model = build(config["student"]["model"], "student.model")
        materialize(model, config["data"]["image_size"], "student.model")
        load_weights(model, self.path / "student.safetensors")
        return model.eval(), config
