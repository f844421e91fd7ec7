"""Loading of a student from the directory of a run or from an exported file."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from kd_lightning.config.nodes import build
from kd_lightning.config.stored import student_data
from kd_lightning.config.trust import check_trusted
from kd_lightning.data.decoding import RESIZE
from kd_lightning.errors import InputError
from kd_lightning.inference.description import Description, valid_temperature
from kd_lightning.inference.exported import read_metadata, read_onnx, read_pt2
from kd_lightning.inference.network import PixelNetwork
from kd_lightning.inference.student import Student
from kd_lightning.models.preparing import materialize
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.weights import load_weights

log = logging.getLogger(__name__)


def load_student(source: str | Path, trust: Iterable[str] = ()) -> Student:
    """Load a student, in evaluation mode, on the CPU.

    Args:
        source: directory of a run, or a file written by `workflows.export`: ``.onnx``, ``.pt2`` or
            ``.safetensors``.
        trust: your own packages that the run may import (see `config.trust.check_trusted`), and
            ``.pt2`` files, which can execute code when they are loaded.

    Raises:
        InputError: a file is missing or damaged, or refers to untrusted code.
    """
    path = Path(source)
    if path.suffix == ".onnx":
        run, description = read_onnx(path)
        return Student(description, run)
    if path.suffix == ".pt2":
        if not any(Path(name) == path or name == path.name for name in trust):
            raise InputError(
                f"{path} could execute code when it is loaded, as torch.export uses pickle; if you "
                f"trust its author, pass trust (--trust {path}), or use a .onnx file"
            )
        run, description = read_pt2(path)
        return Student(description, run)
    if path.suffix == ".safetensors":
        return load_weight_file(path, trust)
    return _from_run(path, trust)


def _from_run(folder: Path, trust: Iterable[str]) -> Student:
    directory = RunDirectory(folder)
    model, config = directory.load_student(trust)
    metrics, data = directory.read_metrics(), student_data(config)
    if not metrics:
        log.warning(
            "%s cannot be read: the names of the classes and the fitted temperature are unknown",
            folder / "metrics.json",
        )  # fmt: skip
    try:
        description = Description(
            class_names=tuple(metrics.get("class_names") or ()),
            image_size=data["image_size"],
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            resize=data["resize"] if data.get("resize") in RESIZE else "squash",
            stored_size=data.get("stored_size"),
            temperature=valid_temperature(metrics.get("temperature") or 1.0),
            run=f"{metrics.get('setting', '')}/{metrics.get('name', folder.name)}",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} is not the directory of a valid run: {error}") from error
    network = PixelNetwork(model, description)
    return Student(description, network, network, config)


def load_weight_file(path: Path, trust: Iterable[str] = ()) -> Student:
    """Load a student from a safetensors file, whatever its suffix; errors as `load_student`."""
    node, description = read_metadata(path)
    check_trusted(node, "model", trust)
    with torch.random.fork_rng(devices=[]):
        model = build(node, "model")
        materialize(model, description.image_size, "model")
    load_weights(model, path)
    network = PixelNetwork(model, description)
    return Student(description, network, network)
