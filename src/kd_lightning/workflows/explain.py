"""Comparison of a finished run's student with its teacher on test images, layer by layer and image
by image.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from kd_lightning.config.checks import single_teachers
from kd_lightning.config.hardware import find_device
from kd_lightning.config.nodes import Node, build
from kd_lightning.config.pretrained import initial_weights, with_own_input
from kd_lightning.config.stored import student_data, student_model
from kd_lightning.config.trust import check_trusted
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.views import PLAIN, Normalization
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.errors import InputError
from kd_lightning.files import replacing, tidy
from kd_lightning.losses import Context
from kd_lightning.losses.pairs import LayerPairs, Pair
from kd_lightning.models.features import FeatureReader, Output, layer_shapes
from kd_lightning.models.pooling import pool
from kd_lightning.models.preparing import materialize
from kd_lightning.models.roles import find_roles
from kd_lightning.models.shapes import LayerShapes
from kd_lightning.models.similarity import centered_gram, cka
from kd_lightning.models.trial import no_gradients
from kd_lightning.reports import explanation_plots, plots
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.weights import load_weights
from kd_lightning.workflows.initial import load_initial
from kd_lightning.workflows.jobs import output_dir

log = logging.getLogger(__name__)

IMAGES = 1000
"""Default number of test images."""

MOST_COMPARED = 512  # images of CKA
MOST_FEATURES = 2**16  # values of a layer for an image; larger maps are pooled
MOST_MAPS = 6  # images with attention maps
BATCH = 64


class Answers(NamedTuple):
    """Predictions of student and teacher for N test images.

    Attributes:
        numbers: (N,), indices of the images in the data module.
        labels: (N,).
        student, teacher: (N, C), probabilities.
    """

    numbers: Tensor
    labels: Tensor
    student: Tensor
    teacher: Tensor


def explain(
    run_dir: str | Path,
    data_root: str | None = None,
    images: int = IMAGES,
    device: str = "cpu",
    trust: Iterable[str] = (),
) -> dict[str, Any]:
    """Write the folder `explanation` of a run, and its pictures to TensorBoard.

    Args:
        run_dir: folder of the run.
        data_root: new location of the images, if they have moved.
        images: number of test images.
        device: ``cpu`` or ``cuda``.
        trust: your own packages that the run may import; see `config.trust.check_trusted`.

    Returns:
        The number of ``images`` and of ``different`` predictions, and ``folder``.

    Raises:
        InputError: the device does not exist, the run is not finished or has no single teacher with
            a network, or a file is missing or damaged or refers to untrusted code.
    """
    place, directory = find_device(device), RunDirectory(run_dir)
    config, metrics = directory.read_config(), directory.read_metrics()
    if metrics.get("status") != "finished":
        raise InputError(f"{run_dir} contains no finished run (status: {metrics.get('status')})")
    _check_teacher(run_dir, config, metrics)
    config["teacher"] = single_teachers(config)[0]["teacher"]  # of an ensemble of one, too
    config["output_dir"] = str(output_dir(config, directory))
    for path, node in (
        ("student.model", student_model(config)),
        ("teacher.model", config["teacher"]["model"]),
        ("data", student_data(config)),
    ):
        check_trusted(node, path, trust)
    if data_root is not None:
        config["data"]["root"] = data_root
    student, _ = directory.load_student(trust)
    teacher = _load_teacher(config, metrics)
    data: ImageDataModule = build(student_data(config), "data")
    data.setup()
    if metrics.get("images_sha256", data.fingerprint()) != data.fingerprint():
        log.warning("the images differ from those that the run was trained and tested on")
    comparison = _Comparison(student.to(place), teacher, config["data"], place)
    test = data.splits["test"]
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    answers, grams = comparison.read(data, test[order[:images]])
    folder = directory.path / "explanation"
    names = [str(name) for name in data.classes]
    _write_differences(directory, answers, names)
    table = _similarities(*grams)
    directory.write_table("explanation/cka", table)
    chosen = answers.numbers[_interesting(answers)]
    shown = slice(0, MOST_MAPS)
    figures = {
        "differences": explanation_plots.differences(*_of_differing(data, answers), names),
        "cka": explanation_plots.similarity(table),
        "attention": explanation_plots.attention(
            _pixels(data, chosen[shown]), comparison.attention(data, chosen[shown])
        ),
    }
    with SummaryWriter(str(directory.path)) as writer:
        for name, figure in figures.items():
            with replacing(folder / f"{name}.png") as partial:
                partial.write_bytes(plots.png(figure, dpi=100))
            writer.add_image(
                f"explanation/{name}", plots.pixels(figure), metrics.get("epochs"),
                dataformats="HWC",
            )  # fmt: skip
    different = int((answers.student.argmax(1) != answers.teacher.argmax(1)).sum())
    return {"images": len(answers.numbers), "different": different, "folder": str(folder)}


def _check_teacher(run_dir: str | Path, config: Node, metrics: Node) -> None:
    parts = single_teachers(config)
    reason = ""
    if metrics.get("teacher_test_accuracy") is None:
        reason = "has no teacher"
    elif len(parts) > 1:
        reason = "has an ensemble of teachers"
    elif parts[0]["teacher"].get("outputs"):
        reason = "has a packed teacher, whose network does not exist"
    elif parts[0]["teacher"].get("decay") is not None:
        reason = "has a teacher that follows the student"
    if reason:
        raise InputError(f"{run_dir} {reason}; explain a run with one teacher network")


def _load_teacher(config: Node, metrics: Node) -> FrozenTeacher:
    """The teacher of a run, from its checkpoint, pretrained weights or the teacher store."""
    data, given = config["data"], student_data(config)
    section = with_own_input(config["teacher"], "teacher", data)
    size = section.get("image_size")
    model = build(section["model"], "teacher.model")
    materialize(model, size or data["image_size"], "teacher.model")
    weights = None if section.get("finetune") else initial_weights(section, "teacher")
    if weights is not None:
        load_initial(model, section["model"], weights)
    else:
        store = Path(config["output_dir"]) / "teachers"
        name = f"{tidy(section['name'])}-{str(metrics.get('teacher_key'))[:16]}"
        load_weights(model, store / name / "teacher.safetensors")
    return FrozenTeacher(
        model,
        expects=Normalization(
            tuple(section.get("mean") or data["mean"]), tuple(section.get("std") or data["std"])
        ),
        given=Normalization(tuple(given["mean"]), tuple(given["std"])),
        image_size=size,
    )


class _Comparison:
    """Reads student and teacher on the same images."""

    def __init__(
        self, student: torch.nn.Module, teacher: FrozenTeacher, data: Node, device: torch.device
    ) -> None:
        self.device, self.teacher = device, teacher
        classes, size = data["num_classes"], data["image_size"]
        shapes = layer_shapes(student, size), teacher.shapes(size)
        self.layers = [_layers(part, classes) for part in shapes]
        self.shapes = shapes
        self.pairs = _pairs(*shapes, classes)
        reads = [
            dict.fromkeys([*layers, *(getattr(pair, whose).layer for pair in self.pairs)])
            for layers, whose in zip(self.layers, ("student", "teacher"), strict=True)
        ]
        self._student = FeatureReader(student, reads[0], num_classes=classes)
        teacher.read(reads[1], num_classes=classes)
        teacher.model.to(device)

    @no_gradients()
    def _ask(self, data: ImageDataModule, index: Tensor) -> tuple[Tensor, Output, Output]:
        """Labels, and the outputs of student and teacher for images without augmentation."""
        batch = data.on_after_batch_transfer(data.render(index, torch.full_like(index, PLAIN)), 0)
        images = batch["images"].to(self.device).contiguous()
        return batch["labels"].cpu(), self._student(images), self.teacher.answer(images)

    def read(
        self, data: ImageDataModule, index: Tensor
    ) -> tuple[Answers, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Predictions, and the Gram matrices of the layers of both networks by name."""
        labels, probabilities = [], ([], [])  # type: ignore[var-annotated]
        features: tuple[dict[str, list[Tensor]], ...] = ({}, {})
        for number, part in enumerate(index.split(BATCH)):
            true, *outputs = self._ask(data, part)
            labels.append(true)
            for who, output in enumerate(outputs):
                probabilities[who].append(output.logits.float().softmax(dim=1).cpu())
                for layer in self.layers[who] if number * BATCH < MOST_COMPARED else ():
                    kept = self._reduced(who, layer, output.features[layer])
                    features[who].setdefault(layer, []).append(kept.float().cpu())
        grams = [
            {layer: centered_gram(torch.cat(parts.pop(layer))) for layer in list(parts)}
            for parts in features
        ]
        both = (torch.cat(part) for part in probabilities)
        return Answers(index, torch.cat(labels), *both), (grams[0], grams[1])

    def _reduced(self, who: int, layer: str, output: Tensor) -> Tensor:
        """A layer's output, average-pooled if it is too large to be kept."""
        layout = self.shapes[who].layouts.get(layer)
        if output[0].numel() <= MOST_FEATURES or layout is None:
            return output
        channels = layout.to_map(output).shape[1]
        side = max(1, int((MOST_FEATURES / channels) ** 0.5))
        return pool(layout.to_map(output), (min(side, layout.height), min(side, layout.width)))

    def attention(self, data: ImageDataModule, index: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """For each pair of layers its title, and the maps (N, h, w) of student and teacher."""
        if not len(index):
            return []
        _, student, teacher = self._ask(data, index)
        return [
            (
                f"{pair.student.layer} / {pair.teacher.layer}",
                _energy(pair.student.of(student)),
                _energy(pair.teacher.of(teacher)),
            )
            for pair in self.pairs
        ]


def _layers(shapes: LayerShapes, num_classes: int) -> list[str]:
    """The stages and the embedding of a network."""
    try:
        roles = find_roles(shapes, num_classes)
    except ValueError as error:
        raise InputError(f"the networks cannot be compared by layers: {error}") from error
    return [*roles.stages, roles.embedding]


def _pairs(student: LayerShapes, teacher: LayerShapes, num_classes: int) -> list[Pair]:
    """Stages with attention maps; none for networks without feature maps."""
    pairs = LayerPairs()
    try:
        pairs.setup(Context(student, teacher, num_classes))
    except ValueError as error:
        log.warning("there are no attention maps: %s", error)
    return pairs.chosen


def _energy(feature_map: Tensor) -> Tensor:
    """Mean over channels of A^2: (B, C, H, W) to (B, H, W); Zagoruyko & Komodakis (2017)."""
    return feature_map.float().square().mean(dim=1).cpu()


def _similarities(
    student: dict[str, Tensor], teacher: dict[str, Tensor]
) -> list[dict[str, float | str]]:
    """CKA of all pairs of layers: a row for each layer of the student."""
    return [
        {"student": layer, **{name: round(cka(gram, other), 6) for name, other in teacher.items()}}
        for layer, gram in student.items()
    ]


def _interesting(answers: Answers) -> Tensor:
    """Positions of images: in turn one where only the teacher is right, and one where both are."""
    right = answers.student.argmax(1) == answers.labels, answers.teacher.argmax(1) == answers.labels
    lost, both = (~right[0] & right[1]).nonzero()[:, 0], (right[0] & right[1]).nonzero()[:, 0]
    count = min(len(lost), MOST_MAPS // 2)
    return torch.cat([lost[:count], both[: MOST_MAPS - count]])


def _order_of_differences(answers: Answers) -> Tensor:
    """Positions of images with different predictions, by descending confidence of the student."""
    confidence, predicted = answers.student.max(dim=1)
    different = (predicted != answers.teacher.argmax(dim=1)).nonzero()[:, 0]
    return different[confidence[different].argsort(descending=True, stable=True)]


def _write_differences(directory: RunDirectory, answers: Answers, names: Sequence[str]) -> None:
    rows = []
    for place in _order_of_differences(answers).tolist():
        row: dict[str, Any] = {"image": int(answers.numbers[place])}
        row["class"] = names[int(answers.labels[place])]
        for who in ("student", "teacher"):
            confidence, predicted = getattr(answers, who)[place].max(dim=0)
            row[who] = names[int(predicted)]
            row[f"{who}_confidence"] = round(float(confidence), 4)
        rows.append(row)
    directory.write_table("explanation/differences", rows)


def _of_differing(
    data: ImageDataModule, answers: Answers
) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Pixels of the differing images that are shown, and their true, student's and teacher's class,
    as many of each kind as fit.
    """
    labels, own, other = answers.labels, answers.student.argmax(1), answers.teacher.argmax(1)
    order = _order_of_differences(answers)
    kinds = (other == labels, own == labels, (own != labels) & (other != labels))
    shown = torch.cat([order[kind[order]][: explanation_plots.COLUMNS] for kind in kinds])
    classes = torch.stack([labels[shown], own[shown], other[shown]], dim=1).tolist()
    return _pixels(data, answers.numbers[shown]), [(a, b, c) for a, b, c in classes]


def _pixels(data: ImageDataModule, index: Tensor) -> Tensor:
    """Images (N, H, W, 3) in [0, 1], without augmentation."""
    if not len(index):
        return torch.zeros(0, 1, 1, 3)
    mean, std = torch.tensor((data.mean, data.std)).view(2, 1, -1, 1, 1)
    images = data.render(index, torch.full_like(index, PLAIN))
    pixels = data.on_after_batch_transfer(images, 0)["images"].cpu() * std + mean
    return pixels.clamp(0, 1).permute(0, 2, 3, 1)
