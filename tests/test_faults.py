"""Real faults: a disk that takes no more, files cut off or full of garbage. Nothing is lost."""

import json
import resource
import signal
import subprocess
import sys

import pytest
from conftest import REPOSITORY, TINY

from kd_lightning.runs import RunDirectory

COMMAND = (
    "train.py", *TINY, "method=none", "student=small", "data=digits", "trainer.max_epochs=3",
    "trainer.precision=32-true", "setting=faults",
)  # fmt: skip


def train(root, *arguments, largest_file=None):
    """In a process that cannot write a file of more bytes than this."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of the process's end
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.run(
        [sys.executable, *COMMAND, *arguments, f"output_dir={root}", f"data_dir={root}/data"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False,
        preexec_fn=limit if largest_file else None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in which nothing went wrong."""
    root = tmp_path_factory.mktemp("whole")
    done = train(root)
    assert done.returncode == 0, done.stderr
    return run_of(root)


def run_of(root):
    (run,) = [path.parent for path in root.glob("runs/faults/*/metrics.json")]
    return run


def left(run):
    metrics = RunDirectory(run).read_metrics()
    kept = {key: metrics[key] for key in ("val_accuracy", "test_accuracy", "best_epoch")}
    return (run / "student.safetensors").read_bytes(), kept


# The first checkpoint does not fit; or it does, but not TensorBoard's file.
@pytest.mark.parametrize("size", [3_000, 20_000])
def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(tmp_path, whole, size):
    done = train(tmp_path, largest_file=size)
    assert done.returncode == 1
    assert "error: File too large" in done.stderr
    assert "free some space, the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    run = run_of(tmp_path)
    assert RunDirectory(run).read_metrics()["status"] == "failed"
    assert not list(tmp_path.rglob("*partial*"))
    again = train(tmp_path)
    assert again.returncode == 0, again.stderr
    assert left(run) == left(whole)


@pytest.mark.parametrize("tenth", range(10))
def test_a_checkpoint_cut_off_anywhere_is_not_gone_on_with(tmp_path, whole, tenth):
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
def test_metrics_of_garbage_are_no_finished_run(tmp_path, garbage):
    (tmp_path / "metrics.json").write_bytes(garbage)
    from kd_lightning.errors import InputError
    from kd_lightning.naming import finished

    config = {"remember": {"dtype": "float16"}, "seed": 0}
    if b"finished" in garbage:  # somebody's finished run is not written over
        with pytest.raises(InputError, match="another configuration"):
            finished(tmp_path, config)
    else:
        assert finished(tmp_path, config) is None
        assert RunDirectory(tmp_path).read_metrics() == {}


def test_the_clock_may_go_backwards(tmp_path, whole):
    """A run is found by what it is, whatever the times of its files."""
    import os

    for path in sorted(whole.rglob("*")):
        os.utime(path, (4e9, 4e9))  # the year 2096
    done = train(whole.parents[2])
    assert done.returncode == 0, done.stderr
    assert "finished before" in done.stdout
    assert json.loads((whole / "metrics.json").read_text())["status"] == "finished"
