"""End-to-end tests of the main command: from data to a tested student."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY, in_a_new_process
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_lightning import api
from kd_lightning.config.complete import plain
from kd_lightning.config.nodes import build
from kd_lightning.results import FIGURE
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows.evaluate import evaluate
from kd_lightning.workflows.student import run

KEYS = {
    "status", "name", "setting", "config_key", "baseline_key",
    "method", "student", "teacher", "data", "seed", "parameters", "teacher_parameters",
    "compression_ratio", "val_accuracy", "test_accuracy", "best_val_accuracy", "best_epoch",
    "test_accuracy_at_best", "teacher_val_accuracy", "teacher_test_accuracy", "agreement",
    "epochs", "train_seconds", "images_per_second", "teacher_key", "git_commit", "python", "torch",
    "lightning", "images_sha256", "teacher_sha256", "code_sha256", "trained_teachers_sha256",
    "stamps", "device", "processes", "precision", "class_names",
    "test_nll", "test_brier", "test_ece", "temperature", "test_nll_calibrated",
    "test_ece_calibrated", "teacher_test_nll", "teacher_test_ece", "teacher_kl",
    "teacher_kl_right", "teacher_kl_wrong", "agreement_right", "agreement_wrong",
    "macs", "file_bytes", "teacher_macs", "teacher_bytes",
}  # fmt: skip


def test_complete_run_with_one_command(train, tmp_path):
    first = train("method=combined")
    assert first.code == 0, first.err
    metrics = first.metrics
    assert set(metrics) == KEYS
    assert set(metrics) <= FIGURE.keys()  # declared once
    assert metrics["status"] == "finished"
    assert metrics["epochs"] == 2
    assert 0 <= metrics["agreement"] <= 1
    assert metrics["compression_ratio"] == metrics["teacher_parameters"] / metrics["parameters"]

    # The output shows the recorded results and the folder.
    for name in ("test_accuracy", "teacher_test_accuracy", "val_accuracy", "agreement"):
        assert f"{100 * metrics[name]:.2f} %" in first.out
    (run,) = first.runs
    assert str(run) in first.out
    # No bar, no warning, as this is not a terminal; one line for the last epoch of each training.
    said = [line.partition(": epoch ")[::2] for line in first.err.splitlines()]
    assert [name.partition("-model")[0] for name, _ in said] == [
        "teacher convnet", "combined-small-s0",
    ]  # fmt: skip
    assert [state[:3] for _, state in said] == ["1/1", "2/2"]
    assert f"val {100 * metrics['val_accuracy']:.2f} %" in said[1][1]

    # The student loaded from the run folder has the same accuracy.
    assert evaluate(run)["accuracy"] == pytest.approx(metrics["test_accuracy"], abs=1e-7)
    moved = shutil.copytree(tmp_path / "images", tmp_path / "moved")
    assert evaluate(run, str(moved))["accuracy"] == evaluate(run)["accuracy"]
    student, config = RunDirectory(run).load_student()
    assert config["data"]["num_classes"] == 3
    assert student(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert yaml.safe_load((run / "config.yaml").read_text()) == config
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}

    # The second run reuses the teacher and gives the same student with the same seed.
    (teacher,) = (tmp_path / "outputs" / "teachers").glob("*/teacher.safetensors")
    trained = teacher.stat().st_mtime_ns
    second = train("method=combined")
    assert second.metrics["teacher_key"] == metrics["teacher_key"]
    assert teacher.stat().st_mtime_ns == trained
    weights = [(r / "student.safetensors").read_bytes() for r in (run, second.runs[0])]
    assert weights[0] == weights[1]


def test_tensorboard_contents(train):
    (run,) = train("method=combined", "trainer.log_every_n_steps=1", "pictures=true").runs
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    scalars = set(tags["scalars"])
    for term in ("cross_entropy", "logit", "attention"):
        assert {f"loss/{term}", f"loss_weighted/{term}"} <= scalars
    assert {"loss/total", "train/accuracy", "val/accuracy", "val/loss"} <= scalars
    assert {"test/accuracy", "test/agreement", "images_per_second"} <= scalars
    assert any(tag.startswith("lr-") for tag in scalars)
    assert {"training views", "test/confusion"} <= set(tags["images"])
    total = events.Scalars("loss/total")[0].value
    parts = [events.Scalars(tag)[0].value for tag in scalars if tag.startswith("loss_weighted/")]
    assert total == pytest.approx(sum(parts), rel=1e-5)
    assert len(events.Scalars("val/accuracy")) == 2


METHODS = sorted(path.stem for path in (REPOSITORY / "configs" / "method").glob("*.yaml"))
TEACHERLESS = {"none", "byot", "tfkd"}
SIMKD = (
    "teacher=resnet9", "teacher.model.width=2", "teacher.optimizer.lr=0.01",
    "teacher.trainer.max_epochs=1", "method.student_wrapper.channels=16",
    "method.student_wrapper.size=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def on_digits(tmp_path_factory):
    """The configuration of a run on digits, by its method.

    Composed with one method, and that of others read from its file: composing takes as long as such
    a run. All methods but SimKD share a teacher.
    """
    student = [setting for setting in TINY if "teacher" not in setting]
    given = (
        "data=digits", "data.image_size=16", "trainer.max_epochs=1", "augmentation=mixup",
        "+trainer.limit_train_batches=2", "+teacher.trainer.limit_train_batches=1",
        "trainer.log_every_n_steps=1", f"output_dir={tmp_path_factory.mktemp('digits')}",
    )  # fmt: skip
    composed = api.compose("method=none", *TINY, *given)

    def config(name):
        if name == "simkd":
            return api.compose("method=simkd", *student, *SIMKD, *given)
        method = OmegaConf.load(REPOSITORY / "configs" / "method" / f"{name}.yaml")
        return plain(OmegaConf.create({**composed, "method": method}))

    return config


@pytest.mark.parametrize("method", [*METHODS, "crd with memory"])
def test_every_method_trains_on_digits(on_digits, tmp_path, method):
    name, _, memory = method.partition(" with ")
    config = on_digits(name)
    if memory:
        config["method"]["terms"]["crd"]["memory"] = True
    if name in TEACHERLESS:
        config["output_dir"] = str(tmp_path)
    metrics = run(config, tmp_path / "run", test=False)
    assert metrics["method"] == name
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    terms = [tag for tag in events.Tags()["scalars"] if tag.startswith("loss/")]
    losses = {tag: [event.value for event in events.Scalars(tag)] for tag in terms}
    assert len(losses) > 1
    for tag, values in losses.items():
        assert len(values) == 2
        assert np.isfinite(values).all()
        # VID may be negative; DKD and ReviewKD are warmed up from 0.
        assert tag == "loss/vid" or values[0] >= 0 < values[1], tag
    # No teacher is trained for a method without teacher.
    assert (metrics["teacher_val_accuracy"] is None) == (name in TEACHERLESS)
    assert Path(config["output_dir"], "teachers").exists() == (name not in TEACHERLESS)


@pytest.mark.parametrize(
    "teacher",
    [
        ["teacher=resnet9", "teacher.model.width=4", "+teacher.model.logit_scale=1.0"],
        ["teacher=resnet20"],
    ],
)
def test_every_teacher_works(train, teacher):
    done = train(
        "method=combined", "optimizer=adamw", "scheduler=cosine", *teacher, "trainer.max_epochs=1",
        "teacher.trainer.max_epochs=1", "student.model.channels=[4,8]", "student.model.hidden=8",
        "trainer.accelerator=cpu", tiny=False,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.metrics["teacher_val_accuracy"] is not None


def test_user_checkpoint_as_teacher(train, tmp_path):
    (run,) = train("method=none", "student.name=mine", "trainer.max_epochs=1").runs
    checkpoint = run / "student.safetensors"
    done = train(
        "method=logit", f"teacher.checkpoint={checkpoint}", "teacher.model.channels=[4,8]",
        "teacher.model.hidden=8", "trainer.max_epochs=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    recorded = json.loads((run / "metrics.json").read_text())
    # As a teacher it has the accuracy that was measured when it was a student.
    assert done.metrics["teacher_test_accuracy"] == recorded["test_accuracy"]
    assert done.metrics["teacher_val_accuracy"] == recorded["val_accuracy"]
    assert done.metrics["teacher_key"] is None
    # Its outputs are cached, but no teacher was trained.
    assert not list((tmp_path / "outputs" / "teachers").rglob("teacher.*"))


def test_user_student_and_term_from_yaml(train):
    done = train(
        "method=logit", "student.name=squeezed",
        "student.model._target_=torchvision.models.squeezenet1_1",
        "~student.model.channels", "~student.model.hidden", "~student.model.image_size",
        "data.image_size=32", "trainer.max_epochs=1", "trainer.accelerator=cpu",
        "teacher.model.channels=[4]", "teacher.model.hidden=8", "teacher.layers=[stage1]",
        "teacher.trainer.max_epochs=1", tiny=False,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.metrics["student"] == "squeezed"


def test_sweep_continues_after_a_failed_run(train, tmp_path):
    done = train("-m", "method=none", "optimizer.lr=0.01,-1,0.02", "trainer.max_epochs=1")
    assert done.code == 2
    assert done.err.count("error:") == 1, done.err
    assert done.runs, done.err + done.out
    assert "optimizer" in done.err
    statuses = sorted(json.loads((r / "metrics.json").read_text())["status"] for r in done.runs)
    assert statuses == ["failed", "finished", "finished"]


def test_best_epoch_and_last_epoch_are_both_recorded(train):
    done = train("method=none", "trainer.max_epochs=6", "optimizer.lr=0.05")
    metrics, (run,) = done.metrics, done.runs
    with (run / "history.csv").open() as file:
        accuracies = [float(row["val_accuracy"]) for row in csv.DictReader(file)]
    assert metrics["epochs"] == len(accuracies) == 6
    assert metrics["best_epoch"] == 1 + accuracies.index(max(accuracies))
    assert metrics["best_val_accuracy"] == pytest.approx(max(accuracies), abs=1e-6)
    assert metrics["val_accuracy"] == pytest.approx(accuracies[-1], abs=1e-6)


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(("+trainer.max_steps=1",), id="before any validation"),
        pytest.param(("+trainer.max_steps=5", "trainer.max_epochs=3"), id="within an epoch"),
        pytest.param(("+trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3"), id="between"),
    ],
)
def test_reported_result_is_of_the_last_weights(train, stop):
    done = train("method=none", "trainer.precision=32-true", *stop)
    assert done.code == 0, done.err
    student, config = RunDirectory(done.runs[0]).load_student()
    data = build(config["data"], "data")
    data.setup()
    for part, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        (batch,) = loader
        right = student.eval()(batch["images"]).argmax(dim=1) == batch["labels"]
        assert done.metrics[f"{part}_accuracy"] == pytest.approx(right.float().mean().item())
    assert done.metrics["best_val_accuracy"] >= done.metrics["val_accuracy"]


def test_finished_run_is_shown_and_not_repeated(train, tmp_path):
    place = ("setting=here", "name=there")
    first = train("method=none", *place)
    (run,) = first.runs
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = train("method=none", *place)
    assert again.code == 0
    assert first.out in again.out
    assert "already finished" in again.out
    other = train("method=none", "optimizer.lr=0.02", *place)
    assert other.code == 2
    assert "finished run of another configuration" in other.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_help_lists_all_choices_without_importing_torch():
    done = in_a_new_process("-X", "importtime", "train.py", "--help")
    assert done.code == 0
    for choice in ("combined", "small", "resnet9", "folder", "one_cycle", "adamw"):
        assert choice in done.out
    assert "torch" not in done.err


def shared(name: str) -> Path:
    import os

    root = Path(os.environ.get("KD_TEST_DATA", "nowhere")) / name
    if not root.exists():
        pytest.skip(f"KD_TEST_DATA is not a folder that contains {name}")
    return root


@pytest.mark.parametrize(
    ("depth", "most", "accuracy"),
    [
        (20, 25, 0.912),
        pytest.param(20, None, 0.9173, marks=pytest.mark.slow),
        pytest.param(56, None, 0.9338, marks=pytest.mark.slow),
    ],
)
def test_third_party_checkpoints_reach_their_accuracy(train, tmp_path, depth, most, accuracy):
    """With their keys and normalisation: the published accuracy on the CIFAR-10 test set, or the
    accuracy measured on its first images.
    """
    from PIL import Image

    checkpoint = next(shared("checkpoints").glob(f"resnet{depth}-*.th"))
    images = tmp_path / "cifar10"
    for sheet in sorted((shared("cifar10") / "test").glob("*-00.webp" if most else "*.webp")):
        column = np.asarray(Image.open(sheet).convert("RGB")).reshape(-1, 32, 32, 3)
        name, part = sheet.stem.rsplit("-", 1)
        for split, count in (("test", most or len(column)), ("train", 5)):
            place = images / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(column[:count]):
                Image.fromarray(image).save(place / f"{part}-{number}.png", compress_level=0)
    done = train(
        "method=logit", "data=folder", f"data.root={images}", f"teacher=resnet{depth}",
        f"teacher.checkpoint={checkpoint}", "teacher.mean=[0.485,0.456,0.406]",
        "teacher.std=[0.229,0.224,0.225]", "student.model.channels=[4,8]", "trainer.max_epochs=1",
        "trainer.precision=32-true", "data.batch_size=16", tiny=False, data=False,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.metrics["teacher_test_accuracy"] == pytest.approx(accuracy, abs=0.0003)
