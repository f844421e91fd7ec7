"""Static 8-bit quantization of ONNX models by onnxruntime."""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from kd_lightning.errors import InputError, RunError
from kd_lightning.inference.description import Description
from kd_lightning.inference.exported import onnx_package, save_onnx

PREPROCESSING = ("Cast", "Mul", "Add", "Transpose")
"""Operators between the pixels and the network, which stay in float32."""


def quantize(
    source: Path, calibration: Iterable[Tensor], description: Description, path: Path
) -> None:
    """Quantize weights and activations of an ONNX model.

    QDQ format: symmetric signed weights with a scale per output channel; asymmetric unsigned
    activations, whose range is that over the calibration images. Weights have 7 of the 8 bits:
    x86 processors without VNNI instructions add two 8-bit products in saturating 16-bit arithmetic,
    which destroys the result otherwise (documentation of onnxruntime's `quantize_static`, "Choosing
    parameters for CPU inference"; docs/shipping.md has figures). Deterministic.

    Args:
        source: the float32 model, written by `write_onnx`.
        calibration: batches of pixels (B, H, W, 3), uint8.
        description: metadata of the new file.
        path: the new file.

    Raises:
        InputError: the packages for ONNX are not installed.
        RunError: onnxruntime cannot quantize the model.
    """
    onnx, quantization = onnx_package("onnx"), onnx_package("onnxruntime.quantization")
    shape_inference = onnx_package("onnxruntime.quantization.shape_inference")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            pixels = next(self._batches, None)
            return None if pixels is None else {"pixels": pixels.numpy()}

    logger = logging.getLogger()
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # onnxruntime logs to the root logger
        with tempfile.TemporaryDirectory() as folder:
            prepared, quantized = Path(folder, "prepared.onnx"), Path(folder, "quantized.onnx")
            # Folds BatchNorm into convolutions, so that both are quantized as one.
            shape_inference.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            model = onnx.load(str(prepared))
            quantization.quantize_static(
                model,
                str(quantized),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=_preprocessing(model.graph),
            )
            result = onnx.load(str(quantized))
    except InputError:  # of an image
        raise
    except Exception as error:  # onnxruntime may raise anything on unusual operators
        reason = (str(error).splitlines() or [""])[0]
        raise RunError(f"onnxruntime cannot quantize the student: {reason}") from error
    finally:
        logger.setLevel(level)
    save_onnx(result, description, path)


def _preprocessing(graph: Any) -> list[str]:
    """Names of the nodes from the input to the network."""
    names: list[str] = []
    tensor = graph.input[0].name
    while True:
        users = [node for node in graph.node if tensor in node.input]
        if len(users) != 1 or users[0].op_type not in PREPROCESSING:
            return names
        names.append(users[0].name)
        tensor = users[0].output[0]
        if users[0].op_type == "Transpose":
            return names
