"""Signals outside of the training, lost jobs of a grid, and what is kept then."""

import os
import random
import signal

import numpy as np
import processes
import pytest
import torch
from lightning.pytorch import Callback
from test_grid import TINY, basic_launcher, launch_in_forks, statuses
from test_resume import configuration, left, whole  # noqa: F401
from test_teachers import KEY, trainer

from kd_lightning.engine.callbacks.resuming import ExactResume
from kd_lightning.engine.callbacks.stopping import stoppable
from kd_lightning.errors import Stopped
from kd_lightning.storage import teacher_store
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.teacher_store import TeacherStore
from kd_lightning.workflows import student as training
from kd_lightning.workflows.grid import read_jobs


class Signal(Callback):
    """Sends a signal to the process in a hook, once."""

    def __init__(self, hook, number):
        self.number = number
        setattr(self, hook, self.send)

    def send(self, *_, **__):
        if self.number:
            number, self.number = self.number, 0
            os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("hook", "number"),
    [
        ("on_test_batch_start", signal.SIGTERM), ("on_test_batch_start", signal.SIGINT),
        ("on_test_batch_end", signal.SIGTERM), ("on_test_batch_end", signal.SIGINT),
        ("on_fit_start", signal.SIGINT),
    ],
)  # fmt: skip
def test_signals_before_and_after_the_training(tmp_path, whole, hook, number):  # noqa: F811
    root, _ = whole
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped) as stopped:
        training.run(configuration(root), tmp_path / "run", callbacks=[Signal(hook, number)])
    assert stopped.value.exit_code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert RunDirectory(tmp_path / "run").read_metrics()["status"] == "running"
    training.run(configuration(root), tmp_path / "run")
    assert left(tmp_path / "run") == left(root / "run")


def test_other_exits_are_kept():
    with pytest.raises(SystemExit) as stop, stoppable():
        raise SystemExit(3)
    assert stop.value.code == 3


def launch_in_forks_and_fail_early():
    """As `launch_in_forks`; the run of seed 1 fails before it has written its metrics."""
    launch_in_forks()
    original = training.prepare

    def prepare(config):
        if config["seed"] == 1:
            raise RuntimeError("no such device")
        return original(config)

    training.prepare = prepare


def test_early_failure_in_another_process_determines_the_exit_code(tmp_path):
    process = processes.start(
        "train.py", "-m", *TINY, "method=none", "seed=0,1", "setting=grid", "data=digits",
        "data.image_size=16", "trainer.max_epochs=1", "+trainer.limit_train_batches=2",
        f"output_dir={tmp_path}", f"data_dir={tmp_path}/data",
        prepare=launch_in_forks_and_fail_early,
    )  # fmt: skip
    process.communicate()
    assert process.returncode == 1
    assert list(statuses(tmp_path / "runs" / "grid").values()) == ["finished", "failed"]
    assert "no such device" in (tmp_path / "runs" / "grid" / "results.md").read_text()


def lose_a_job():
    """Replace Hydra's launcher by one that loses a job, as a cluster may."""
    launcher = basic_launcher()
    launch = launcher.launch

    def launch_some(self, job_overrides, initial_job_idx):
        kept = [overrides for overrides in job_overrides if "seed=1" not in overrides]
        return launch(self, kept, initial_job_idx)

    launcher.launch = launch_some


def test_a_lost_job_of_a_grid_is_a_failure(tmp_path):
    process = processes.start(
        "train.py", "-m", "method=none", "seed=0,1", "setting=grid", "data=digits",
        "data.image_size=16", "trainer.max_epochs=1", "+trainer.limit_train_batches=2",
        "pictures=false", f"output_dir={tmp_path}", prepare=lose_a_job,
    )  # fmt: skip
    _, err = process.communicate()
    assert process.returncode == 1, err
    assert "1 of 2 runs left no record" in err
    assert not list(tmp_path.rglob(".folders*"))


def test_unreadable_records_of_jobs_are_left_out(tmp_path):
    (tmp_path / "jobs").write_text('["a", 0, 1.5, 0]\n["a", 1, 2.\n["a", 2, 0.0, 1]\n')
    assert [job.number for job in read_jobs(tmp_path / "jobs")] == [0, 2]


def test_checkpoints_of_a_teacher_are_kept_until_it_is_complete(tmp_path, monkeypatch):
    def train(folder):
        (folder / "checkpoints").mkdir(exist_ok=True)
        return trainer([])(folder)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(teacher_store, "file_sha256", full)
        with pytest.raises(OSError, match="No space"):
            TeacherStore(tmp_path).obtain("tiny", KEY, train)
    assert list(tmp_path.glob("*.partial/checkpoints"))
    place = TeacherStore(tmp_path).obtain("tiny", KEY, train).path
    assert not (place / "checkpoints").exists()


def test_random_numbers_of_users_code_are_resumed(tmp_path):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    callback = ExactResume()
    torch.save(callback.state_dict(), tmp_path / "state")
    expected = draw()
    callback.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    callback.on_train_start(type("Trainer", (), {"global_rank": 0}), None)
    assert draw() == expected
