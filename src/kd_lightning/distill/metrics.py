"""Metric collections, correctly reduced over several processes."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from kd_lightning.data.loading import Batch


class CrossEntropyLoss(MeanMetric):
    """Mean cross-entropy of logits (B, C) with labels (B,) over all images; NaN propagates."""

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")

    def update(self, logits: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """Add a batch."""
        loss = F.cross_entropy(logits.float(), labels)
        # Created on the device: a Python number would be copied synchronously.
        super().update(loss, weight=loss.new_full((), len(logits)))


def accuracy(num_classes: int) -> MulticlassAccuracy:
    """Fraction of correctly classified images (micro average)."""
    return MulticlassAccuracy(num_classes, average="micro", validate_args=False)


def confusion_matrix(num_classes: int) -> MulticlassConfusionMatrix:
    """Counts (C, C), [true class, predicted class]."""
    return MulticlassConfusionMatrix(num_classes, validate_args=False)


def train_metrics(num_classes: int) -> MetricCollection:
    """Metrics of the student on training views."""
    return MetricCollection({"train/accuracy": accuracy(num_classes)})


def val_metrics(num_classes: int) -> MetricCollection:
    """Metrics of the student on validation images."""
    metrics = {"val/accuracy": accuracy(num_classes), "val/loss": CrossEntropyLoss()}
    return MetricCollection(dict(metrics), compute_groups=False)


def test_metrics(num_classes: int) -> MetricCollection:
    """Metrics of the student on test images."""
    return MetricCollection({"test/accuracy": accuracy(num_classes)})


def largest_labels(batch: Batch) -> Tensor:
    """The labels (B,), int64, with the larger share in each image."""
    if "ratio" not in batch:
        return batch["labels"]
    return torch.where(batch["ratio"] >= 0.5, batch["labels"], batch["partner_labels"])
