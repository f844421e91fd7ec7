"""Packed teachers: the recorded outputs of a teacher, used without its network.

    teacher=packed teacher.outputs=FILE        FILE is written by `scripts/cache.py pack RUN FILE`

The file may be from an untrusted source: whatever enters the configuration is checked here, so that
nothing in it can be imported, interpolated, or become part of a path.
"""

import copy
import json
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict

from kd_lightning.config.nodes import Node
from kd_lightning.errors import InputError
from kd_lightning.files import home

NETWORK = "kd_lightning.distill.recorded.RecordedNetwork"
MANIFEST = "manifest.json"
TEACHER_FORMAT = 2  # format 1 is a single cache, without a teacher
DAMAGED = (
    zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError,
    KeyError, ValueError, TypeError, AttributeError, EOFError,
)  # fmt: skip
"""Errors of the standard library for a damaged archive or manifest."""

_LARGEST = 2**26  # numbers in a layer's output for one image
_NAME = re.compile(r"\w[\w.:+-]*( x\d+)?", re.ASCII)


class PackedCache(NamedTuple):
    """One cache in a packed file: its key, the geometry of its rows, and the names of its files."""

    key: Node
    rows: Node
    files: frozenset[str]


class PackedLayers(NamedTuple):
    """The layers of a packed teacher; see `models.LayerShapes`."""

    shapes: dict[str, tuple[int, ...]]
    inputs: dict[str, tuple[int, ...]]
    layouts: dict[str, tuple[str, int, int, int]]
    input_layouts: dict[str, tuple[str, int, int, int]]
    modified: tuple[str, ...]
    roles: tuple[tuple[str, ...], str, str] | None


class PackedTeacher(NamedTuple):
    """The teacher in a packed file.

    Attributes:
        file: the file.
        name: name of the network.
        parameters: number of parameters.
        layers: the layers that methods read by default, `teacher.layers`.
        facts: validation and test accuracy, fractions.
        shapes: shapes of all its layers.
        key: what all its outputs depend on; see `distill.caching`.
        caches: name to cache.
    """

    file: Path
    name: str
    parameters: int
    layers: tuple[str, ...]
    facts: dict[str, float]
    shapes: PackedLayers
    key: Node
    caches: dict[str, PackedCache]


def fill_in_packed(config: DictConfig) -> DictConfig:
    """A configuration with the name and the layers of a packed teacher; else the same one.

    Args:
        config: composed, with interpolations.

    Raises:
        InputError: the file is not given, damaged, or not a packed teacher.
    """
    outputs = OmegaConf.select(config, "teacher.outputs")
    if OmegaConf.select(config, "teacher.model._target_") != NETWORK:
        if outputs is not None:
            raise InputError("teacher.outputs is the file of a packed teacher: add teacher=packed")
        return config
    if config.teacher.get("members") is not None:
        return config  # rejected later, as any ensemble with a packed teacher
    if not isinstance(outputs, str):
        raise InputError(
            "teacher=packed needs teacher.outputs=FILE, one file of scripts/cache.py pack"
        )
    packed = read_packed(outputs)
    folder = {key: config[key] for key in ("setting", "name")}  # as composed: that of the run
    config = copy.deepcopy(config)
    with open_dict(config):
        config.merge_with(folder)
        if config.teacher.name == "packed":
            config.teacher.name = packed.name
        if not config.teacher.layers:
            config.teacher.layers = list(packed.layers)
    return config


def read_packed(file: str | Path) -> PackedTeacher:
    """Read what a packed file contains; its rows are verified when they are unpacked.

    Raises:
        InputError: it does not exist, is damaged, or contains no teacher.
    """
    path = Path(home(str(file)))
    if not path.is_file():
        raise InputError(f"teacher.outputs={file} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = read_manifest(archive)
        if manifest["format"] == 1:
            raise InputError(
                f"{file} is a single cache, which does not describe its teacher: pack it again "
                "with scripts/cache.py pack RUN FILE, where RUN is the folder of a finished run"
            )
        return _teacher(path, manifest)
    except DAMAGED as error:
        raise InputError(f"{file} is damaged, or not a packed teacher: {error}") from error


def read_manifest(archive: zipfile.ZipFile) -> Any:
    """The manifest of a packed file, which is small.

    Raises:
        ValueError, KeyError, ...: see `DAMAGED`.
    """
    if archive.getinfo(MANIFEST).file_size > _LARGEST:
        raise ValueError("its manifest is too large")
    return json.loads(archive.read(MANIFEST))


def _teacher(path: Path, manifest: Mapping[str, Any]) -> PackedTeacher:
    if manifest["format"] != TEACHER_FORMAT:
        raise ValueError(f"its format {manifest['format']} is not known to this version")
    teacher, layers = manifest["teacher"], manifest["teacher"]["shapes"]
    caches = {cache["name"]: _cache(cache) for cache in manifest["caches"]}
    keys = [cache.key for cache in caches.values() if "term" not in cache.key]
    if len(keys) != 1 or len(keys[0]["normalization"]) != 4:
        raise ValueError("it has no outputs on the test images, or those of several teachers")
    return PackedTeacher(
        file=path,
        name=_name(teacher["name"]),
        parameters=_number(teacher["parameters"]),
        layers=tuple(_name(layer) for layer in teacher["layers"]),
        facts={key: _fraction(teacher[key]) for key in ("val_accuracy", "test_accuracy")},
        shapes=PackedLayers(
            _shapes(layers["shapes"]),
            _shapes(layers["inputs"]),
            _layouts(layers["layouts"]),
            _layouts(layers["input_layouts"]),
            tuple(map(str, layers["modified"])),
            None if layers["roles"] is None else _roles(*layers["roles"]),
        ),
        key={key: value for key, value in keys[0].items() if key != "dtype"},
        caches=caches,
    )


def _cache(node: Mapping[str, Any]) -> PackedCache:
    key, rows = dict(node["key"]), dict(node["rows"])
    dict(key.get("term", {}))
    _name(rows["dtype"])
    return PackedCache(key, rows, frozenset(node["files"]))


def is_name(value: Any) -> bool:
    """Whether a packed file may contain this as the name of a teacher, or of a layer it reads."""
    return isinstance(value, str) and len(value) <= 100 and bool(_NAME.fullmatch(value))


def _name(value: Any) -> str:
    if not is_name(value):
        raise ValueError(f"{value!r} is not a name")
    return str(value)


def _number(value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value < 2**40:
        raise ValueError(f"{value!r} is not a number of parameters, or a size")
    return value


def _fraction(value: Any) -> float:
    if type(value) is not float or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not an accuracy")
    return value


def _shapes(node: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes = {_printable(layer): tuple(map(_number, shape)) for layer, shape in node.items()}
    if any(math.prod(shape) > _LARGEST for shape in shapes.values()):
        raise ValueError("an output of a layer is too large")
    return shapes


def _layouts(node: Mapping[str, Any]) -> dict[str, tuple[str, int, int, int]]:
    return {
        _printable(layer): (_name(kind), _number(height), _number(width), _number(start, 0))
        for layer, (kind, height, width, start) in node.items()
    }


def _roles(stages: list[str], embedding: str, classifier: str, pooled: str = "") -> tuple[Any, ...]:
    return tuple(map(_printable, stages)), *map(_printable, (embedding, classifier, pooled))


def _printable(layer: str) -> str:
    if not layer.isprintable():
        raise ValueError(f"{layer!r} is not the name of a layer")
    return layer
