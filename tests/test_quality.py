"""Scores of probabilities, temperature scaling, and the student beside its teacher."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import stats
from sklearn.metrics import accuracy_score, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from kd_lightning.distill import calibration
from kd_lightning.distill.calibration import (
    BINS,
    LARGEST,
    SMALLEST,
    ProbabilityScores,
    RecordedLogits,
    fit_temperature,
)
from kd_lightning.distill.quality import Quality, TeacherComparison
from kd_lightning.engine.launch import launch

IMAGES, CLASSES = 500, 7


def draw(seed=0, scale=2.0, images=IMAGES):
    """Calibrated logits with labels drawn from their probabilities, and other logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(images, CLASSES, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    return logits, labels, logits + torch.randn(images, CLASSES, generator=generator)


def scored(metric, logits, labels, batch=64):
    for part, true in zip(logits.split(batch), labels.split(batch), strict=True):
        metric.update(part, true)
    return metric.compute()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_scores_equal_references(temperature):
    logits, labels, _ = draw()
    scores = scored(ProbabilityScores(temperature), logits, labels)
    p = (logits.double() / temperature).softmax(dim=1)
    assert float(scores.nll) == pytest.approx(log_loss(labels, p, labels=range(CLASSES)), rel=1e-5)
    brier = np.square(p.numpy() - np.eye(CLASSES)[labels]).sum(axis=1).mean()
    assert float(scores.brier) == pytest.approx(brier, rel=1e-5)
    ece = multiclass_calibration_error(p, labels, CLASSES, n_bins=BINS, norm="l1")
    assert scores.ece == pytest.approx(float(ece), rel=1e-5)


def test_calibration_error_by_hand():
    """Confidences 0.9 and 0.8, one of four wrong: |0.5 - 0.9| and |1 - 0.8|, half the images each.

    Brier scores: 0.02 and 1.62 of the first two, 0.08 of the others.
    """
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
    scores = scored(ProbabilityScores(), p.log(), torch.tensor([0, 1, 1, 1]))
    assert scores.ece == pytest.approx((0.4 + 0.2) / 2)
    assert float(scores.brier) == pytest.approx((0.02 + 1.62 + 2 * 0.08) / 4)


def test_certainty_is_in_the_last_bin():
    bins = scored(ProbabilityScores(), torch.tensor([[0.0, -torch.inf]]), torch.tensor([0])).bins
    assert bins[-1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_temperature_is_the_factor_of_the_logits(factor):
    logits, labels, _ = draw(images=20_000)
    calibrated = fit_temperature(logits, labels)
    assert calibrated == pytest.approx(1, abs=0.03)
    found = fit_temperature(logits * factor, labels)
    assert found == pytest.approx(factor * calibrated, rel=1e-5)


def test_temperature_minimises_the_likelihood(monkeypatch):
    monkeypatch.setattr(calibration, "_ROWS", 64)  # several parts
    _, labels, logits = draw()
    best = fit_temperature(logits, labels)
    losses = [
        log_loss(labels, (logits.double() / t).softmax(dim=1), labels=range(CLASSES))
        for t in (best, best * 0.995, best * 1.005)
    ]
    assert losses[0] == min(losses)


def test_temperature_is_bounded():
    logits, labels, _ = draw()
    assert fit_temperature(logits, logits.argmax(dim=1)) == SMALLEST
    assert fit_temperature(logits, logits.argmin(dim=1)) == LARGEST
    # A class that is impossible, in an image of another class.
    masked = logits.masked_fill(
        torch.nn.functional.one_hot((labels + 1) % CLASSES).bool(), -torch.inf
    )
    assert SMALLEST < fit_temperature(masked, labels) < LARGEST


def test_temperature_of_a_single_image():
    recorded = RecordedLogits()
    recorded.update(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))
    assert fit_temperature(*recorded.compute()) == SMALLEST


def test_recorded_logits_are_limited(monkeypatch):
    logits, labels, _ = draw(images=100)
    recorded = RecordedLogits()
    for _ in range(2):
        kept, true = scored(recorded, logits, labels, batch=30)
        assert torch.equal(kept, logits)
        assert torch.equal(true, labels)
        recorded.reset()
    monkeypatch.setattr(calibration, "MOST_VALUES", 60 * CLASSES)
    # Of images that are ordered by class, every class is kept.
    kept, true = scored(recorded, logits, labels, batch=30)
    assert torch.equal(kept, logits[::2])
    assert torch.equal(true, labels[::2])
    recorded.reset()
    monkeypatch.setattr(calibration, "MOST_VALUES", 10 * CLASSES)
    kept, true = scored(recorded, logits, labels, batch=7)
    assert torch.equal(kept, logits[::16])
    assert torch.equal(true, labels[::16])


def test_comparison_equals_scipy_and_is_split_by_the_teacher():
    teacher, labels, student = draw()
    metric = TeacherComparison(CLASSES)
    for part in torch.arange(IMAGES).split(64):
        metric.update(student[part], teacher[part], labels[part])
    found = metric.compute()
    p, q = (x.double().softmax(dim=1).numpy() for x in (teacher, student))
    divergence = stats.entropy(p, q, axis=1)
    right = (teacher.argmax(dim=1) == labels).numpy()
    same = (teacher.argmax(dim=1) == student.argmax(dim=1)).numpy()
    for group, members in enumerate((~right, right)):
        assert found.images[group] == members.sum()
        assert found.agreeing[group] == same[members].sum()
        assert float(found.divergence[group]) == pytest.approx(divergence[members].sum(), rel=1e-5)
    for label in range(CLASSES):
        own = (labels == label).numpy()
        assert found.class_right[label] == right[own].sum()
        assert found.class_agreeing[label] == same[own].sum()


def test_figures_and_tables():
    teacher, labels, student = draw()
    quality = Quality(CLASSES)
    quality.calibrate(2.0)
    quality.update(student, labels)
    confusion = torch.zeros(CLASSES + 1, CLASSES + 1).long()
    confusion[labels, student.argmax(dim=1)] += 0
    for true, predicted in zip(labels, student.argmax(dim=1), strict=True):
        confusion[true, predicted] += 1
    names = [f"class {label}" for label in range(CLASSES + 1)]
    assert not any("teacher" in name or "agree" in name for name in quality.figures())
    assert set(quality.per_class(confusion, names)[0]) == {"class", "images", "accuracy"}

    quality = Quality(CLASSES + 1)
    quality.update(student, labels)
    quality.compare(student, teacher, labels, counts=True)
    quality.compare(student, teacher, labels, counts=False)
    figures = quality.figures()
    parts = [
        (figures[f"agreement_{name}"], share)
        for name, share in (
            ("right", accuracy_score(labels, teacher.argmax(1))),
            ("wrong", 1 - accuracy_score(labels, teacher.argmax(1))),
        )
    ]
    agreement = accuracy_score(teacher.argmax(dim=1), student.argmax(dim=1))
    assert sum(part * share for part, share in parts) == pytest.approx(agreement)
    rows = quality.per_class(confusion, names)
    assert sum(row["images"] for row in rows) == IMAGES
    own = labels == 3
    assert rows[3]["accuracy"] == pytest.approx(
        accuracy_score(labels[own], student[own].argmax(dim=1)), abs=1e-6
    )
    assert rows[3]["teacher_accuracy"] == pytest.approx(
        accuracy_score(labels[own], teacher[own].argmax(dim=1)), abs=1e-6
    )
    assert rows[-1] == {
        "class": "class 7", "images": 0, "accuracy": "", "teacher_accuracy": "", "agreement": "",
    }  # fmt: skip
    bins = quality.reliability()
    assert len(bins) == 2 * BINS
    raw = [row for row in bins if row["scores"] == "raw" and row["images"]]
    ece = sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in raw) / IMAGES
    assert figures["test_ece"] == pytest.approx(ece, abs=1e-5)


def test_infinite_figures_are_left_out():
    quality = Quality(2)
    quality.update(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]))
    assert "test_nll" not in quality.figures()
    assert quality.figures()["test_brier"] == 2


SIZES = ((40, 23), (63, 0))


def gathered():
    """The results of two processes with each of these numbers of images."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", world_size=2, rank=rank)
    teacher, labels, student = draw(images=63)
    results = []
    for sizes in SIZES:
        own = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        if not sizes[rank]:
            own = slice(0, 1)  # an image that does not count
        recorded, quality = RecordedLogits(), Quality(CLASSES)
        recorded.update(student[own], labels[own], bool(sizes[rank]))
        if sizes[rank]:
            quality.update(student[own], labels[own])
        quality.compare(student[own], teacher[own], labels[own], bool(sizes[rank]))
        temperature = fit_temperature(*recorded.compute())
        results.append((temperature, quality.figures(), quality.reliability()))
    return results


def test_processes_give_the_figures_of_all_images():
    teacher, labels, student = draw(images=63)
    quality = Quality(CLASSES)
    quality.update(student, labels)
    quality.compare(student, teacher, labels, counts=True)
    for temperature, figures, bins in launch(2, gathered):
        assert temperature == pytest.approx(fit_temperature(student, labels), rel=1e-9)
        assert figures == pytest.approx(quality.figures(), rel=1e-5)
        assert [row["images"] for row in bins] == [row["images"] for row in quality.reliability()]
