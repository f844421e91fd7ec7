"""Export of the student of a run to a file for other programs, compared with the student."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_lightning.config.nodes import Node
from kd_lightning.config.stored import student_model
from kd_lightning.config.trust import check_trusted
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.views import PLAIN
from kd_lightning.errors import InputError, RunError
from kd_lightning.files import replacing
from kd_lightning.inference import exported
from kd_lightning.inference.loading import load_student, load_weight_file
from kd_lightning.inference.quantizing import quantize
from kd_lightning.inference.student import BATCH, Runner, Student
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows.assembly import build_data

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest allowed difference of float32 logits; times the largest logit if that is above 1."""

MAX_LOSS = 0.01
"""Largest allowed loss of test accuracy by 8-bit integers; one percentage point."""

CALIBRATION = 512
"""Number of training images that determine the ranges of 8-bit activations."""

RANDOM = 256
"""Number of random images that are compared if there are no test images."""


@dataclass(frozen=True)
class Exported:
    """An exported file and its comparison with the student.

    Attributes:
        path: the file.
        images: number of compared images.
        random: whether these were random pixels, because the test images are not available.
        difference: largest absolute difference of a logit.
        magnitude: largest absolute logit of the student.
        agreement: fraction of images with the same predicted class.
        accuracy: of the file on the compared images; None for random images.
        student_accuracy: of the student on the same images.
    """

    path: Path
    images: int
    random: bool
    difference: float
    magnitude: float
    agreement: float
    accuracy: float | None
    student_accuracy: float | None


def export(
    run_dir: str | Path,
    to: str = "onnx",
    *,
    int8: bool = False,
    out: str | Path | None = None,
    data_root: str | None = None,
    trust: Iterable[str] = (),
    max_loss: float = MAX_LOSS,
) -> Exported:
    """Export the student of a run, and compare the file with it on all test images.

    The file takes pixels (B, H, W, 3), uint8, RGB, of any batch size, and returns logits (B, C);
    see `inference.exported`. It is written atomically, after the comparison.

    Args:
        run_dir: folder of the run.
        to: ``onnx``, ``pt2`` (a `torch.export` program) or ``safetensors``.
        int8: quantize to 8-bit integers; only ONNX.
        out: the file; by default ``exported/student.onnx`` etc. in `run_dir`.
        data_root: new location of the images, if they have moved.
        trust: your own packages that the run may import; see `config.trust.check_trusted`.
        max_loss: with `int8`, the largest allowed loss of test accuracy, as a fraction.

    Raises:
        InputError: an argument is invalid, a file of the run is missing or damaged, or a package is
            not installed.
        RunError: the student cannot be exported, or the file differs from it too much; nothing is
            written.
        OSError: the file cannot be written.
    """
    trust = tuple(trust)
    if not 0 <= max_loss <= 1:
        raise InputError(
            f"--max-loss must be from 0 to 100 percentage points, not {100 * max_loss}"
        )
    path = _check(Path(run_dir), to, int8, out)
    student = load_student(run_dir, trust)
    data = _find_data(Path(run_dir), student.config, data_root, trust)
    if int8 and data is None:
        raise InputError(
            "--int8 needs the training images to calibrate the ranges of the activations; give "
            "their location with --data-root"
        )
    with replacing(path) as partial:
        run = _write(student, to, data if int8 else None, partial, trust)
        result = _compare(student, run, data, path)
        _judge(result, max_loss if int8 else None)
    return result


def _check(run_dir: Path, to: str, int8: bool, out: str | Path | None) -> Path:
    """Check the arguments; return the file to write."""
    if to not in exported.SUFFIXES:
        raise InputError(f"the format must be {', '.join(exported.SUFFIXES)}, not {to}")
    if int8 and to != "onnx":
        raise InputError("--int8 is only available for ONNX: --to onnx --int8")
    if to == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            exported.onnx_package(name)
    suffix = exported.SUFFIXES[to]
    name = f"student{'-int8' if int8 else ''}{suffix}"
    path = Path(out) if out is not None else run_dir / "exported" / name
    if path.suffix != suffix:
        raise InputError(f"the name of the file must end in {suffix}, not {path.name}")
    place = path.resolve()
    if place.name == "student.safetensors" and (place.parent / "config.yaml").exists():
        raise InputError(f"{path} is the file of a run; choose another name")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    return path


def _find_data(
    run_dir: Path, config: Node, data_root: str | None, trust: Iterable[str]
) -> ImageDataModule | None:
    """The images of the run, or None if they are not available any more.

    Raises:
        InputError: `data_root` is given and contains no images; or the data are untrusted.
    """
    node = dict(config["data"])
    check_trusted(node, "data", trust)
    if data_root is not None:
        node["root"] = data_root
    try:
        data = build_data(node)
        data.setup()
    except InputError as error:
        if data_root is not None:
            raise
        log.warning("the images of the run are not available: %s", error)
        return None
    recorded = RunDirectory(run_dir).read_metrics().get("images_sha256")
    if recorded not in (None, data.fingerprint()):
        log.warning("the images differ from those that the run was trained and tested on")
    return data


def _write(
    student: Student, to: str, calibration: ImageDataModule | None, path: Path, trust: Iterable[str]
) -> Runner:
    """Write a file and read it again."""
    network, description = student.network, student.description
    assert network is not None  # as it was loaded from a run
    if to == "safetensors":
        exported.write_safetensors(network, student_model(student.config), description, path)
        return load_weight_file(path, trust).run
    program = exported.trace(network, description.image_size)
    if to == "pt2":
        exported.write_pt2(program, description, path)
        return exported.read_pt2(path)[0]
    exported.write_onnx(program, description, path)
    if calibration is not None:
        images = (pixels for pixels, _ in _calibration_batches(calibration))
        quantize(path, images, description, path)
    return exported.read_onnx(path)[0]


def _calibration_batches(data: ImageDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    """Training images without augmentation, at equal distances over the training set."""
    train = data.splits["train"]
    count = min(CALIBRATION, len(train))
    chosen = torch.arange(count) * len(train) // count
    return pixel_batches(data, train[chosen], size=64)


def pixel_batches(
    data: ImageDataModule, index: Tensor, size: int = BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels (B, H, W, 3), uint8, and labels (B,) of images, without augmentation."""
    plain = data.variant(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    for part in index.split(size):
        batch = plain.render(part, torch.full_like(part, PLAIN))
        pixels = batch["images"].round().to(torch.uint8).permute(0, 2, 3, 1)
        yield pixels.contiguous().cpu(), batch["labels"].cpu()


def _random_batches(size: int) -> Iterator[tuple[Tensor, None]]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (RANDOM, size, size, 3), generator=generator, dtype=torch.uint8)
    for part in pixels.split(BATCH):
        yield part, None


@torch.inference_mode()
def _compare(student: Student, run: Runner, data: ImageDataModule | None, path: Path) -> Exported:
    images: Iterable[tuple[Tensor, Tensor | None]]
    if data is None:
        images = _random_batches(student.image_size)
    else:
        images = pixel_batches(data, data.splits["test"])
    count = same = correct = student_correct = 0
    difference = magnitude = 0.0
    for pixels, labels in images:
        expected, got = student.run(pixels), run(pixels)
        # `max` would ignore NaN.
        difference = max(difference, float((got - expected).abs().nan_to_num(nan=torch.inf).max()))
        magnitude = max(magnitude, float(expected.abs().max()))
        count += len(pixels)
        same += int((got.argmax(1) == expected.argmax(1)).sum())
        if labels is not None:
            correct += int((got.argmax(1) == labels).sum())
            student_correct += int((expected.argmax(1) == labels).sum())
    return Exported(
        path=path,
        images=count,
        random=data is None,
        difference=difference,
        magnitude=magnitude,
        agreement=same / count,
        accuracy=correct / count if data is not None else None,
        student_accuracy=student_correct / count if data is not None else None,
    )


def _judge(result: Exported, max_loss: float | None) -> None:
    """Reject a file that differs too much from the student.

    Args:
        result: the comparison.
        max_loss: of a quantized file; None for float32.

    Raises:
        RunError: it does; the message has the figures.
    """
    if max_loss is None:
        allowed = TOLERANCE * max(1.0, result.magnitude)
        if result.difference > allowed:
            raise RunError(
                f"the exported student differs from the original: the largest difference of a "
                f"logit is {result.difference:.2g}, allowed are {allowed:.2g}, and "
                f"{100 * result.agreement:.2f} % of {result.images:,} images have the same class; "
                "no file is written"
            )
    elif result.accuracy is not None and result.student_accuracy is not None:
        loss = result.student_accuracy - result.accuracy
        if loss > max_loss + 1e-9:  # 0.83 - 0.82 is above 0.01
            raise RunError(
                f"8-bit integers lose {100 * loss:.2f} percentage points of test accuracy "
                f"({100 * result.student_accuracy:.2f} to {100 * result.accuracy:.2f} %), allowed "
                f"are {100 * max_loss:.2f}; no file is written; --max-loss allows more"
            )
