"""Quality of a student on the test images beyond its accuracy, alone and beside its teacher."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from kd_lightning.distill.calibration import BINS, ProbabilityScores, Scores

GROUPS = ("wrong", "right")
"""Test images by whether the teacher classifies them correctly."""


class Comparison(NamedTuple):
    """A student compared with its teacher.

    Attributes:
        images: (2,), the number of images of each of `GROUPS`.
        agreeing: (2,), of these, those to which both assign the same class.
        divergence: (2,), sum of KL(teacher || student), in nats.
        class_right: (C,), correct predictions of the teacher by true class.
        class_agreeing: (C,), images to which both assign the same class, by true class.
    """

    images: Tensor
    agreeing: Tensor
    divergence: Tensor
    class_right: Tensor
    class_agreeing: Tensor


class TeacherComparison(Metric):
    """Computes `Comparison` over all batches and processes.

    Args:
        num_classes: number of classes C.
    """

    full_state_update = False
    images: Tensor
    agreeing: Tensor
    divergence: Tensor
    class_right: Tensor
    class_agreeing: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        for name in Comparison._fields:
            size = num_classes if name.startswith("class") else len(GROUPS)
            kind = torch.float32 if name == "divergence" else torch.long
            self.add_state(name, torch.zeros(size, dtype=kind), dist_reduce_fx="sum")

    def update(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> None:
        """Add a batch of logits (B, C) of student and teacher, with labels (B,)."""
        predicted = teacher.argmax(dim=1)
        right, same = predicted == labels, logits.argmax(dim=1) == predicted
        divergence = kl_divergence(teacher, logits)
        for group, members in enumerate((~right, right)):
            self.images[group] += members.sum()
            self.agreeing[group] += (same & members).sum()
            self.divergence[group] += (divergence * members).sum()
        self.class_right += torch.bincount(labels[right], minlength=self.num_classes)
        self.class_agreeing += torch.bincount(labels[same], minlength=self.num_classes)

    def compute(self) -> Comparison:
        """The counts and sums of all images."""
        return Comparison(*(getattr(self, name) for name in Comparison._fields))


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of each image at temperature 1, in nats: logits (B, C) to (B,)."""
    target, own = teacher.float().log_softmax(dim=1), student.float().log_softmax(dim=1)
    p = target.exp()
    return torch.where(p > 0, p * (target - own), 0).sum(dim=1)


class Quality(nn.Module):
    """Scores of the student on the test images, before and after temperature scaling, those of the
    teacher, and their comparison.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.student, self.calibrated = ProbabilityScores(), ProbabilityScores()
        self.teacher = ProbabilityScores()
        self.comparison = TeacherComparison(num_classes)
        self.compared = False

    def reset(self) -> None:
        """Forget the images, but not the temperature."""
        for metric in (self.student, self.calibrated, self.teacher, self.comparison):
            metric.reset()
        self.compared = False

    def calibrate(self, temperature: float) -> None:
        """Set the temperature of the calibrated scores."""
        self.calibrated.temperature = temperature

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of the student's logits (B, C), with labels (B,)."""
        self.student.update(logits, labels)
        self.calibrated.update(logits, labels)

    def compare(self, logits: Tensor, teacher: Tensor, labels: Tensor, counts: bool) -> None:
        """Add a batch of logits (B, C) of student and teacher, with labels (B,).

        Args:
            logits: the student's.
            teacher: the teacher's.
            labels: the true classes.
            counts: whether the batch is part of the test set, or only keeps processes together.
        """
        self.compared = True
        if counts:
            self.teacher.update(teacher, labels)
            self.comparison.update(logits, teacher, labels)

    def figures(self) -> dict[str, float]:
        """The figures of `results.py`, of all processes; those that are not finite are left out."""
        own, calibrated = self.student.compute(), self.calibrated.compute()
        found = {
            "test_nll": float(own.nll),
            "test_brier": float(own.brier),
            "test_ece": own.ece,
            "test_nll_calibrated": float(calibrated.nll),
            "test_ece_calibrated": calibrated.ece,
        }
        if self.compared:
            teacher, compared = self.teacher.compute(), self.comparison.compute()
            found |= {"teacher_test_nll": float(teacher.nll), "teacher_test_ece": teacher.ece}
            sums = compared.divergence.double()
            found["teacher_kl"] = float(sums.sum() / compared.images.sum())
            for group, name in enumerate(GROUPS):
                if images := int(compared.images[group]):
                    found[f"teacher_kl_{name}"] = float(sums[group]) / images
                    found[f"agreement_{name}"] = int(compared.agreeing[group]) / images
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def reliability(self) -> list[dict[str, Any]]:
        """Rows of `reliability.csv`: the bins of confidence, before and after scaling."""
        return [
            {"scores": name, **row}
            for name, scores in (("raw", self.student), ("calibrated", self.calibrated))
            for row in _bins(scores.compute())
        ]

    def per_class(self, confusion: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of `per_class.csv`: accuracies and agreement by true class.

        Args:
            confusion: (C, C) counts, [true class, predicted class].
            names: class names.
        """
        images, right = confusion.sum(dim=1).tolist(), confusion.diagonal().tolist()
        rows: list[dict[str, Any]] = [
            {"class": name, "images": count, "accuracy": _ratio(correct, count)}
            for name, count, correct in zip(names, images, right, strict=True)
        ]
        if self.compared:
            compared = self.comparison.compute()
            parts = compared.class_right.tolist(), compared.class_agreeing.tolist()
            for row, correct, agreeing in zip(rows, *parts, strict=True):
                row["teacher_accuracy"] = _ratio(correct, row["images"])
                row["agreement"] = _ratio(agreeing, row["images"])
        return rows


def _bins(scores: Scores) -> list[dict[str, Any]]:
    rows = []
    for number, (images, confidence, correct) in enumerate(scores.bins.tolist()):
        rows.append(
            {
                "lower": round(number / BINS, 6),
                "upper": round((number + 1) / BINS, 6),
                "images": int(images),
                "confidence": round(confidence / images, 6) if images else "",
                "accuracy": round(correct / images, 6) if images else "",
            }
        )
    return rows


def _ratio(part: float, whole: float) -> float | str:
    return round(part / whole, 6) if whole else ""
