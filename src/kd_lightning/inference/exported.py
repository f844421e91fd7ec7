"""Files for other programs: `torch.export` programs (.pt2), ONNX and safetensors.

All take pixels (B, H, W, 3), uint8, and carry the student's `Description` in their metadata.
"""

import contextlib
import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.export import Dim, ExportedProgram

from kd_lightning.config.nodes import Node
from kd_lightning.errors import InputError, RunError
from kd_lightning.inference.description import Description
from kd_lightning.inference.network import PixelNetwork
from kd_lightning.inference.student import Runner
from kd_lightning.storage.weights import separate_state

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ".safetensors"}
"""Format to the suffix of its files."""

MODEL = "model"  # key of the model's node in the metadata of safetensors files
EXTRA = "kd_lightning.json"  # file with the metadata inside of a .pt2 archive


def onnx_package(name: str) -> ModuleType:
    """Import onnx, onnxscript or onnxruntime.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"ONNX files need the package {error.name or name}: pip install -e '.[export]'"
        ) from error


def trace(network: PixelNetwork, image_size: int) -> ExportedProgram:
    """Export a network with a dynamic batch size.

    Raises:
        RunError: `torch.export` does not support the model's code.
    """
    example = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(
                network, (example,), dynamic_shapes=({0: Dim("batch")},), strict=False
            )
    except Exception as error:  # tracing a user's code may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise RunError(
            f"torch.export cannot trace the student with a variable batch size: "
            f"{type(error).__name__}: {reason}"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def write_pt2(program: ExportedProgram, description: Description, path: Path) -> None:
    """Write a `torch.export` program."""
    with path.open("wb") as file, _quiet():
        extra = {EXTRA: json.dumps(description.as_metadata())}
        torch.export.save(program, file, extra_files=extra)


def read_pt2(path: Path) -> tuple[Runner, Description]:
    """Read a `torch.export` program. Only for trusted files: torch unpickles parts of them.

    Raises:
        InputError: the file is missing, damaged or was not written by `write_pt2`.
    """
    extra = {EXTRA: ""}
    try:
        with path.open("rb") as file, _quiet():
            run = torch.export.load(file, extra_files=extra).module()
        metadata = json.loads(extra[EXTRA] or "{}")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except Exception as error:  # torch may raise anything on damaged files
        raise InputError(f"{path} is damaged or not a torch.export program: {error}") from error
    return lambda pixels: run(_bytes(pixels)), Description.from_metadata(metadata, str(path))


def write_onnx(program: ExportedProgram, description: Description, path: Path) -> None:
    """Write an ONNX model with input ``pixels`` and output ``logits``.

    Raises:
        InputError: the packages for ONNX are not installed.
        RunError: the exporter does not support an operator.
    """
    for name in ("onnxscript", "onnx"):
        onnx_package(name)
    try:
        with _quiet():
            found = torch.onnx.export(
                program,
                input_names=["pixels"],
                output_names=["logits"],
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RunError(f"the student cannot be exported to ONNX: {reason}") from error
    if found is None:
        raise RunError("the student cannot be exported to ONNX")
    model = found.model_proto
    model.graph.name = "student"
    for node in model.graph.node:
        # Source paths of this machine, and the history of the graph.
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    save_onnx(model, description, path)


def save_onnx(model: "onnx.ModelProto", description: Description, path: Path) -> None:  # type: ignore[name-defined] # noqa: F821
    """Write an ONNX model with the description as its metadata."""
    model.ClearField("metadata_props")
    onnx_package("onnx").helper.set_model_props(model, description.as_metadata())
    path.write_bytes(model.SerializeToString(deterministic=True))


def read_onnx(path: Path) -> tuple[Runner, Description]:
    """Read an ONNX model; executed on the CPU, with as many threads as torch.

    Raises:
        InputError: the file is missing, damaged or was not written by `write_onnx`, or onnxruntime
            is not installed.
    """
    runtime = onnx_package("onnxruntime")
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = runtime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its own exception types have no common base class
        raise InputError(f"{path} is damaged or not an ONNX model: {error}") from error
    metadata = session.get_modelmeta().custom_metadata_map
    description = Description.from_metadata(metadata, str(path))
    pixels = [(node.name, tuple(node.shape[1:])) for node in session.get_inputs()]
    size, names = description.image_size, description.class_names
    classes = session.get_outputs()[0].shape[-1]
    if pixels != [("pixels", (size, size, 3))] or (names and len(names) != classes):
        raise InputError(f"{path} was not written by scripts/export.py: its metadata do not fit it")

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixels": _bytes(pixels).numpy()})[0])

    return run, description


def write_safetensors(
    network: PixelNetwork, node: Node, description: Description, path: Path
) -> None:
    """Write the weights of the model, and in the metadata its ``_target_`` node.

    Args:
        network: the network.
        node: builds the model.
        description: classes and preprocessing.
        path: the file.
    """
    save_file(
        separate_state(network.model), path, description.as_metadata() | {MODEL: json.dumps(node)}
    )


def read_metadata(path: Path) -> tuple[Node, Description]:
    """The model's node and the description in a safetensors file.

    Raises:
        InputError: the file is missing, damaged, or was not written by `write_safetensors`.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        node = json.loads(metadata.get(MODEL, "null"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise InputError(
            f"{path} does not describe its model; export the run with scripts/export.py "
            "--to safetensors, or give the folder of the run"
        )
    return node, Description.from_metadata(metadata, str(path))


def _bytes(pixels: Tensor) -> Tensor:
    if pixels.dtype != torch.uint8:
        pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    return pixels.contiguous()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings and log messages of torch's exporters about their own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
