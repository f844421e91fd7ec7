"""Real faults: full disks, truncated files, garbage. Nothing is lost."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import processes
import pytest
from conftest import FOLDER, TINY, Finished, write_folder
from filelock import FileLock
from lightning.pytorch import Trainer

from kd_lightning import api
from kd_lightning.storage import teacher_cache as memory
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows import grid as sweep

COMMAND = (
    "train.py", *TINY, "method=none", "student=small", "data=digits", "data.image_size=16",
    "data.batch_size=128", "trainer.max_epochs=3", "trainer.precision=32-true", "setting=faults",
)  # fmt: skip


def train(root, *arguments, largest_file=None):
    """Run in a process with a limited file size."""

    process = processes.start(
        *COMMAND, *arguments, f"output_dir={root}", f"data_dir={root}/data",
        prepare=partial(limit, largest_file) if largest_file else None,
    )  # fmt: skip
    out, err = process.communicate()
    return Finished(process.returncode, out, err, [])


def train_here(root):
    """Run in this process."""
    api.run(*COMMAND[1:], f"output_dir={root}", f"data_dir={root}/data")


def limit(largest_file):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # raise an error instead of killing the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without faults."""
    root = tmp_path_factory.mktemp("whole")
    train_here(root)
    return run_of(root)


def run_of(root):
    (run,) = [path.parent for path in root.glob("runs/faults/*/metrics.json")]
    return run


def left(run):
    metrics = RunDirectory(run).read_metrics()
    kept = {key: metrics[key] for key in ("val_accuracy", "test_accuracy", "best_epoch")}
    return (run / "student.safetensors").read_bytes(), kept


def test_full_disk_is_reported_and_the_run_resumes(tmp_path, whole):
    # Large enough for the first checkpoint, but not for TensorBoard's file.
    done = train(tmp_path, largest_file=20_000)
    assert done.code == 1
    assert "error: File too large" in done.err
    assert "rerun the same command to resume" in done.err
    assert "Traceback" not in done.err
    run = run_of(tmp_path)
    assert RunDirectory(run).read_metrics()["status"] == "failed"
    assert not list(tmp_path.rglob("*partial*"))
    train_here(tmp_path)
    assert left(run) == left(whole)


@pytest.mark.parametrize("tenth", range(10))
def test_truncated_checkpoint_is_not_resumed(tmp_path, whole, tenth):
    run = RunDirectory(tmp_path)
    content = (whole / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.write_bytes(content[: len(content) * tenth // 10])
    assert run.checkpoint() is None
    path.write_bytes(content)
    assert run.checkpoint().epochs == 3


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"status": "finished"}', b"\0" * 4096]
)
def test_garbage_metrics_are_not_a_finished_run(tmp_path, garbage):
    (tmp_path / "metrics.json").write_bytes(garbage)
    from kd_lightning.config.finished import finished
    from kd_lightning.errors import InputError

    config = {"remember": {"dtype": "float16"}, "seed": 0, "data": {}, "data_dir": "data"}
    if b"finished" in garbage:  # a finished run is not overwritten
        with pytest.raises(InputError, match="another configuration"):
            finished(tmp_path, config)
    else:
        assert finished(tmp_path, config) is None
        assert RunDirectory(tmp_path).read_metrics() == {}


def test_clock_set_back_has_no_effect(tmp_path, whole):
    """A run is identified by its configuration, not by the times of its files."""
    for path in sorted(whole.rglob("*")):
        os.utime(path, (4e9, 4e9))  # the year 2096
    done = train(whole.parents[2])
    assert done.code == 0, done.err
    assert "already finished" in done.out
    assert json.loads((whole / "metrics.json").read_text())["status"] == "finished"


class Disk:
    """A small separate file system."""

    def __init__(self, place):
        self.place = place
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a file system")

    def fill(self):
        with (self.place / "filler").open("wb", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def free(self):
        (self.place / "filler").unlink()

    def mount(self, how):
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.place)], check=True)

    def remove(self):
        subprocess.run(["umount", "--lazy", str(self.place)], check=True)


@pytest.fixture
def disk(tmp_path):
    """The output folder of `train`."""
    disk = Disk(tmp_path / "outputs")
    yield disk
    disk.remove()


def before(monkeypatch, disk, owner, name, which=lambda *_, **__: True):
    """Fill the disk just before this is written."""
    original = getattr(owner, name)

    def write(*args, **kwargs):
        if which(*args, **kwargs) and not (disk.place / "filler").exists():
            disk.fill()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, write)


def is_finished(run, metrics):
    return metrics["status"] == "finished"


def is_student_checkpoint(trainer, path, *_):
    return "full" in Path(path).parts


def is_student(run, model, name="student"):
    return name == "student"


def is_teacher(run, model, name="student"):
    return name == "teacher"


DISTIL = ("method=logit", "trainer.precision=32-true", "trainer.max_epochs=1")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A run without faults, of `train`."""
    root = tmp_path_factory.mktemp("distilled")
    rest = (
        "trainer.log_every_n_steps=1",
        f"data.root={write_folder(root / 'images')}",
        f"output_dir={root / 'outputs'}",
    )
    done = api.run(*FOLDER, *TINY, *rest, *DISTIL)
    return Path(done["folder"])


@pytest.mark.parametrize(
    ("owner", "name", "which"),
    [
        (RunDirectory, "write_config", lambda run, config: run.path.parent.name == "full"),
        (Trainer, "save_checkpoint", is_student_checkpoint),
        (RunDirectory, "save_weights", is_teacher),
        (RunDirectory, "save_weights", is_student),
        (RunDirectory, "write_table", lambda run, name, rows: name == "history"),
        (RunDirectory, "write_table", lambda run, name, rows: name == "confusion"),
        (RunDirectory, "write_metrics", is_finished),
    ],
)
def test_full_disk_while_a_result_is_written(
    train, disk, monkeypatch, distilled, owner, name, which
):
    settings = (*DISTIL, "setting=full")
    if which is not is_teacher:
        shutil.copytree(distilled.parents[2] / "teachers", disk.place / "teachers")
    with monkeypatch.context() as patch:
        before(patch, disk, owner, name, which)
        done = train(*settings)
    assert (done.code, done.err.count("error: ")) == (1, 1)
    assert "error: No space left on device: " in done.err
    assert "rerun the same command to resume" in done.err
    assert "Traceback" not in done.err
    assert not list(disk.place.rglob(".*.partial"))
    disk.free()
    again = train(*settings)
    assert again.code == 0, again.err
    assert left(disk.place / "runs" / "full" / distilled.name) == left(distilled)


def test_full_disk_while_an_output_is_cached(train, disk, monkeypatch, caplog):
    """Outputs are computed instead; the student is the same."""
    settings = (*DISTIL, "remember.dtype=float32", "trainer.max_epochs=2")
    (reference,) = train(*settings, "setting=whole").runs
    shutil.rmtree(disk.place / "teachers" / "remembered")
    reserve = memory.Rows.reserve
    refused = []

    def on_a_full_disk(rows, view):
        disk.fill()
        try:
            reserve(rows, view)
        except OSError as error:
            refused.append(error.errno)
            raise
        finally:
            disk.free()

    with monkeypatch.context() as patch:
        patch.setattr(memory.Rows, "reserve", on_a_full_disk)
        done = train(*settings, "setting=full")
    assert done.code == 0, done.err
    assert set(refused) == {errno.ENOSPC}
    assert "no further teacher outputs are cached" in caplog.text + done.err
    assert not list(disk.place.glob("teachers/remembered/*/*.rows"))
    assert left(disk.place / "runs" / "full" / reference.name) == left(reference)


def test_full_disk_while_a_grid_writes_its_table(train, disk, monkeypatch):
    """No run is lost, and the same command writes the table."""
    grid = ("-m", "method=none", "seed=0,1", "setting=grid", "trainer.max_epochs=1")
    with monkeypatch.context() as patch:
        from kd_lightning.reports import documents

        before(patch, disk, documents, "write_text")
        patch.setattr(sweep, "update", once_full(disk, sweep.update))
        done = train(*grid)
    assert "could not be updated: [Errno 28] No space left on device" in done.err
    done = train(*grid)
    assert done.code == 0, done.err
    assert (disk.place / "runs" / "grid" / "results.csv").read_text().count("finished") == 2


def once_full(disk, update):
    """The disk has free space again after a table."""

    def updated(folder, **how):
        update(folder, **how)
        (disk.place / "filler").unlink(missing_ok=True)

    return updated


def test_folder_not_writable_is_reported_before_training(train, disk):
    run = disk.place / "runs" / "old"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text("{}")
    disk.mount("ro")
    for arguments in (("method=none", "setting=other"), ("-m", "method=none", "setting=other")):
        done = train(*arguments)
        assert done.code == 2
        assert "error: output_dir cannot be written: Read-only file system" in done.err
        assert "Traceback" not in done.err
    disk.mount("rw")
    assert (run / "metrics.json").read_text() == "{}"
    assert train("method=none", "setting=other").code == 0


HOLDER = """
import sys, time
from pathlib import Path
from kd_lightning.storage.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)
"""


def test_lock_of_a_dead_process_is_released(tmp_path):
    script = tmp_path / "holder.py"
    script.write_text(HOLDER)
    holder = processes.start(str(script), str(tmp_path))
    while holder.out != "held\n":
        assert holder.poll() is None
        time.sleep(0.01)
    lock = FileLock(tmp_path / ".lock")
    with pytest.raises(TimeoutError):
        lock.acquire(timeout=0)
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with RunDirectory(tmp_path).lock(wait=False):
        pass


def test_concurrent_grids_in_one_folder_train_every_run_once(tmp_path):
    command = [
        "train.py", "-m", *TINY, "method=logit", "teacher.trainer.max_epochs=3", "setting=grid",
        "data=digits", "data.image_size=16", "data.batch_size=128", "trainer.max_epochs=1",
        f"output_dir={tmp_path}", f"data_dir={tmp_path}/d",
    ]  # fmt: skip
    # Both need the teacher at once, as they begin with different runs.
    grids = [processes.start(*command, f"seed={seeds}") for seeds in ("0,1", "1,0")]
    said = [grid.communicate() for grid in grids]
    # A run that the other grid is executing is skipped with a message: exit code 1.
    for grid, (_, err) in zip(grids, said, strict=True):
        passed_over = "another process is working on" in err
        assert grid.returncode == (1 if passed_over else 0), err
        assert "Traceback" not in err
    runs = list((tmp_path / "runs" / "grid").glob("*/metrics.json"))
    assert len(runs) == 2
    for metrics in runs:
        assert json.loads(metrics.read_text())["status"] == "finished"
        # The second last number is the PID of the writer.
        writers = {path.name.split(".")[-2] for path in metrics.parent.glob("events.*")}
        assert len(writers) == 1
    assert len(list((tmp_path / "teachers").glob("*/teacher.safetensors"))) == 1
    assert sum(err.count("teacher convnet: epoch") for _, err in said) == 1
    assert (tmp_path / "runs" / "grid" / "results.csv").read_text().count("finished") == 2
    assert not list((tmp_path / "runs").rglob(".folders*"))
