"""Resume after any interruption gives the result of an uninterrupted run."""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import processes
import pytest
import torch
from conftest import TINY, write_folder
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from kd_lightning.config.complete import plain
from kd_lightning.config.naming import register
from kd_lightning.config.tree import tree
from kd_lightning.errors import RunError, Stopped
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows import student as training
from kd_lightning.workflows.jobs import prepare
from kd_lightning.workflows.record import begin_record

register()


class Dropping(nn.Sequential):
    """A student that draws random numbers in every step."""

    def __init__(self, num_classes=3):
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Dropout(0.5), nn.Flatten(), nn.Linear(32, num_classes),
        )  # fmt: skip


BATCHES = 5  # per epoch: 33 of 36 images, batch size 7
SETTING = (
    *TINY, "method=combined", "optimizer=adamw", "student.layers=['2']", "data=folder",
    "data.image_size=16", "data.padding=2", "data.batch_size=7", "trainer.max_epochs=3",
    "trainer.precision=32-true", "trainer.log_every_n_steps=1",
)  # fmt: skip


def configuration(root, *overrides):
    images = root / "images"
    if not images.exists():
        write_folder(images)
    given = (f"data.root={images}", f"data_dir={root / 'data'}", f"output_dir={root / 'outputs'}")
    with initialize_config_dir(str(Path(tree()).absolute()), version_base="1.3"):
        config = plain(compose("train", [*SETTING, *given, *overrides]))
    config["student"]["model"] = {"_target_": "test_resume.Dropping"}
    return config


def answers(output):
    """Cached teacher outputs by file: one row per image, zeros if missing."""
    found = {}
    for path in sorted(output.glob("teachers/remembered/**/*.rows")):
        content, images = path.read_bytes(), 48 if "evaluation" in path.parent.name else 36
        width = len(content) // images
        rows = [content[number * width : (number + 1) * width] for number in range(images)]
        found[path.relative_to(output)] = rows
    assert found
    return found


class Ask(Callback):
    """Sends a signal to the process in the nth batch, or in the validation after it."""

    def __init__(self, batch, validation=False, number=signal.SIGTERM):
        self.batch, self.validation, self.number = batch, validation, number

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 == self.batch and not self.validation:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, module, *_):
        if trainer.fit_loop.total_batch_idx + 1 == self.batch and self.validation:
            os.kill(os.getpid(), self.number)


class Steps(Callback):
    """Records the images and random numbers of each step."""

    def __init__(self):
        self.shown = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.shown.append(
            (batch["shown"].index.tolist(), batch["shown"].view.tolist(), float(outputs["loss"]))
        )


def left(folder):
    run = RunDirectory(folder)
    metrics = run.read_metrics()
    kept = ("status", "val_accuracy", "test_accuracy", "test_accuracy_at_best", "best_epoch")
    rows = (folder / "history.csv").read_text().splitlines()
    return (
        (folder / "student.safetensors").read_bytes(),
        [row.rpartition(",")[0] for row in rows],  # without speed
        [metrics[key] for key in kept],
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    seen = Steps()
    # The others are without figures, which draw no random numbers.
    training.run(configuration(root, "pictures=true"), root / "run", callbacks=[seen])
    assert len(seen.shown) == 3 * BATCHES
    return root, seen.shown


@pytest.mark.parametrize(
    "stops",
    [
        [
            (1, False, "step 1 (batch 1 of epoch 1)"),
            (4, False, "step 4 (batch 4 of epoch 1)"),
            (5, False, "epoch 1"),
            (6, False, "step 6 (batch 1 of epoch 2)"),
            (15, False, "epoch 3"),
        ],
        [
            (2, False, "step 2 (batch 2 of epoch 1)"),
            (5, True, "epoch 1"),
            (15, True, "epoch 3"),
        ],
    ],
    ids=["in training", "in validation"],
)
def test_resume_after_signals_is_bit_identical(tmp_path, whole, stops):
    root, shown = whole
    config, folder = configuration(root), tmp_path / "run"
    seen = Steps()
    for step, validation, place in stops:
        with pytest.raises(Stopped, match="stopped by") as stop:
            training.run(config, folder, callbacks=[seen, Ask(step, validation)])
        assert str(stop.value) == (
            f"stopped by SIGTERM: {config['name']} is saved at {place}; "
            "run the same command again to resume"
        )
        assert stop.value.exit_code == 143
        assert RunDirectory(folder).read_metrics()["status"] == "running"
        assert seen.shown == shown[:step]  # the same steps, each once
    training.run(config, folder, callbacks=[seen])
    assert seen.shown == shown
    assert left(folder) == left(root / "run")


def test_signal_before_the_first_checkpoint():
    said = str(Stopped(signal.SIGINT, "teacher convnet", None))
    assert said.startswith("stopped by Ctrl-C: teacher convnet is not saved yet")
    assert Stopped(signal.SIGINT, "x", None).exit_code == 130


def test_checkpoint_of_another_configuration_is_never_resumed(tmp_path, whole):
    root, shown = whole
    config, folder = configuration(root), tmp_path / "run"
    with pytest.raises(Stopped):
        training.run({**config, "seed": 5}, folder, callbacks=[Ask(2 * BATCHES)])
    begin_record(prepare(config), RunDirectory(folder), "")  # killed before its first checkpoint
    seen = Steps()
    training.run(config, folder, callbacks=[seen])
    assert seen.shown == shown


def test_tensorboard_curves_after_resume(tmp_path, whole):
    root, _ = whole
    with pytest.raises(Stopped):
        training.run(configuration(root), tmp_path / "run", callbacks=[Ask(8)])
    time.sleep(1.1)  # event files are ordered by the seconds in their names
    training.run(configuration(root), tmp_path / "run")
    assert curves(tmp_path / "run") == curves(root / "run")


def curves(folder):
    """TensorBoard's curves except speed: no step duplicated or missing."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith(("l", "train", "val"))]
    assert {"lr-AdamW", "loss/total", "loss_weighted/logit", "val/loss"} <= set(names)
    return {name: [(row.step, row.value) for row in events.Scalars(name)] for name in names}


@pytest.mark.parametrize(
    ("setting", "steps"),
    [
        ("+trainer.limit_train_batches=3", (1, 2, 3, 4)),
        # The first four batches of an epoch, not of the same: a batch may be finished first.
        ("+trainer.val_check_interval=2", (1, 3, 7, 9)),
        ("+trainer.accumulate_grad_batches=2", (1, 3, 7, 9)),
    ],
)
def test_signals_during_validation_or_gradient_accumulation(tmp_path, whole, setting, steps):
    root, _ = whole
    config = configuration(root, setting, "trainer.max_epochs=2")
    training.run(config, tmp_path / "whole")
    for step in steps:
        with pytest.raises(Stopped):
            training.run(config, tmp_path / "run", callbacks=[Ask(step)])
    training.run(config, tmp_path / "run")
    assert left(tmp_path / "run") == left(tmp_path / "whole")


def asked_twice(root, folder):
    training.run(configuration(root), folder, callbacks=[Ask(7), Ask(7)])


def test_second_signal_ends_immediately(tmp_path, whole):
    """The current step is not saved; resumed from the previous checkpoint."""
    root, _ = whole
    folder = tmp_path / "run"
    process = processes.SERVER.Process(target=asked_twice, args=(root, folder))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGTERM
    assert RunDirectory(folder).checkpoint().place == "epoch 1"
    training.run(configuration(root), folder)
    assert left(folder) == left(root / "run")


class Spoil(Callback):
    """Weights are NaN from the nth batch on."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 >= self.batch:
            with torch.no_grad():
                module.student[0].weight.fill_(float("nan"))


def test_nonfinite_loss_keeps_the_last_valid_checkpoint(tmp_path, whole):
    root, _ = whole
    config, folder = configuration(root), tmp_path / "run"
    said = r"the loss is not finite at step 7 \(term: cross_entropy, logit, attention\)"
    with pytest.raises(RunError, match=said):
        training.run(config, folder, callbacks=[Spoil(8)])
    assert RunDirectory(folder).read_metrics()["status"] == "failed"
    checkpoint = RunDirectory(folder).checkpoint()
    assert checkpoint.place == "epoch 1"
    state = torch.load(checkpoint.path, weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
    # It can be resumed, in case of a hardware fault.
    training.run(config, folder)
    assert left(folder) == left(root / "run")


def test_bf16_is_reproducible(tmp_path, whole):
    root, _ = whole
    config = configuration(root, "trainer.precision=bf16-mixed", "trainer.max_epochs=2")
    training.run(config, tmp_path / "one")
    with pytest.raises(Stopped):
        training.run(config, tmp_path / "two", callbacks=[Ask(7)])
    training.run(config, tmp_path / "two")
    assert left(tmp_path / "one") == left(tmp_path / "two")


def test_resume_restores_the_memory_bank(tmp_path, whole):
    root, _ = whole
    memory = ("method=crd", "method.terms.crd.memory=true", "method.terms.crd.negatives=10")
    config = configuration(root, *memory, "trainer.max_epochs=2")
    training.run(config, tmp_path / "one")
    with pytest.raises(Stopped):
        training.run(config, tmp_path / "two", callbacks=[Ask(3)])
    training.run(config, tmp_path / "two")
    assert left(tmp_path / "one") == left(tmp_path / "two")
    one, two = (
        torch.load(RunDirectory(tmp_path / name).checkpoint().path, weights_only=True)["state_dict"]
        for name in ("one", "two")
    )
    assert one["terms.crd.bank._extra_state"][1] == 2 * BATCHES
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], value) for name, value in one.items())


def test_lost_cache_rows_are_recomputed_bit_identically(tmp_path):
    """For a part of the batch, the order of floating-point additions would differ."""
    config = configuration(tmp_path, "remember.dtype=float32", "trainer.max_epochs=2")
    training.run(config, tmp_path / "first")
    before = answers(tmp_path / "outputs")
    generator = random.Random(1)
    for path, rows in before.items():
        lost = set(generator.sample(range(len(rows)), len(rows) // 3))
        kept = [bytes(len(row)) if n in lost else row for n, row in enumerate(rows)]
        (tmp_path / "outputs" / path).write_bytes(b"".join(kept))
    training.run(config, tmp_path / "second")
    assert left(tmp_path / "second") == left(tmp_path / "first")
    assert answers(tmp_path / "outputs") == before


def test_result_depends_on_the_seed(tmp_path, whole):
    root, shown = whole
    seen = Steps()
    with pytest.raises(Stopped):
        training.run(configuration(root, "seed=1"), tmp_path, callbacks=[seen, Ask(1)])
    (order, _, loss), (same_order, _, same_loss) = seen.shown[0], shown[0]
    assert order != same_order
    assert loss != same_loss


def everything(output):
    """Weights, history and results of a student and its teacher."""
    (run,) = [path.parent for path in output.glob("runs/*/*/metrics.json")]
    (teacher,) = output.glob("teachers/*/teacher.json")
    facts = json.loads(teacher.read_text())
    return left(run), facts["sha256"], facts["facts"]["val_accuracy"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_resume_after_kill_at_random_moments(tmp_path, kills):
    """In the teacher's or the student's training, at any instruction."""
    images = write_folder(tmp_path / "images")

    def start(output):
        return processes.start(
            "train.py", *SETTING, f"data.root={images}", f"data_dir={tmp_path / 'data'}",
            f"output_dir={output}", "student.layers=[stage1,stage2]", "trainer.max_epochs=4",
            "teacher.trainer.max_epochs=4",
        )  # fmt: skip

    def finish(output):
        process = start(output)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        return everything(output)

    began = time.perf_counter()
    expected, said = finish(tmp_path / "whole"), answers(tmp_path / "whole")
    duration = time.perf_counter() - began
    generator = random.Random(0)
    killed = 0
    for number in range(3 * kills):  # some may end before they are killed
        output = tmp_path / f"killed-{number}"
        began = time.perf_counter()
        process = start(output)
        with contextlib.suppress(TimeoutError):
            process.wait(generator.uniform(0, duration))  # then it is killed
        if process.wait() == -signal.SIGKILL:
            killed += 1
        else:  # faster than the first run, e.g. as other work on the machine has ended
            duration = time.perf_counter() - began
        assert finish(output) == expected
        # After the last epoch it is validated again, so that more outputs are cached.
        for path, rows in answers(output).items():
            for row, same in zip(said[path], rows, strict=True):
                assert row in (same, bytes(len(row)))
        if killed == kills:
            break
    tries = number + 1
    print(
        f"{killed} of {tries} killed, of runs that took {duration:.1f} s: {tries} identical results"
    )
    assert killed == kills
