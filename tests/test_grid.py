"""Grids: complete results, continuous updates, and resume after an interruption."""

import csv
import json
import os
import re
import shutil
import signal
import time

import processes
import pytest
import torch
from conftest import TINY, in_a_new_process
from hydra.core.plugins import Plugins

from kd_lightning import cli
from kd_lightning.engine.callbacks.pictures import Pictures
from kd_lightning.errors import RunError
from kd_lightning.reports import documents
from kd_lightning.reports.documents import EXPLANATIONS, FIGURES
from kd_lightning.reports.runs import read_runs
from kd_lightning.reports.statistics import summarise
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows import grid, record
from kd_lightning.workflows import student as training

GRID = ("-m", "setting=grid", "method=none,logit", "seed=0,1")


def statuses(folder):
    return {
        path.parent.name.partition("-model")[0]: json.loads(path.read_text())["status"]
        for path in folder.glob("*/metrics.json")
    }


def test_grid_trains_reports_and_is_not_repeated(train, tmp_path, monkeypatch):
    # Figures of the grid only; test_main_job.py tests those of a run.
    for hook in ("on_train_start", "on_test_epoch_end"):
        monkeypatch.setattr(Pictures, hook, lambda *_: None)
    draw, drawn = documents.draw, []

    def draw_all(runs, *rest):
        drawn.append(len(runs))
        return draw(runs, *rest) if len(runs) == 4 else {}

    monkeypatch.setattr(documents, "draw", draw_all)
    monkeypatch.setattr(grid, "MINUTE", 1e9)  # a busy machine may need longer for the four runs
    # Unaffected by other grids.
    other = tmp_path / "outputs" / "runs" / "other"
    (other / "none-small-s9").mkdir(parents=True)
    (other / "none-small-s9" / "metrics.json").write_text('{"status": "failed"}')
    (other / "results.md").write_text("a table of another grid")
    (other / ".results.json").write_text("{}")
    for path in [*other.glob("*results*"), *other.glob("*/metrics.json")]:
        os.utime(path, (4e9, 4e9))
    done = train(*GRID, "pictures=true")
    assert done.code == 0, done.err
    assert "another grid" not in done.out
    assert not list((tmp_path / "outputs").rglob(".folders*"))
    folder = tmp_path / "outputs" / "runs" / "grid"
    assert statuses(folder) == dict.fromkeys(
        ["none-small-s0", "none-small-s1", "logit-small-s0", "logit-small-s1"], "finished"
    )
    assert (folder / "results.csv").read_text().count("finished") == 4
    assert {path.stem for path in folder.glob("*.png")} == set(FIGURES) - set(EXPLANATIONS)
    assert drawn == [1, 4]  # at once, then not within a minute, and at the end
    table = done.out.partition("test accuracy in per cent")[2]  # at the end
    rows = [line.split() for line in table.splitlines() if line.startswith(("none ", "logit "))]
    assert [row[0] for row in rows] == ["none", "logit"]
    assert all("(2)" in row for row in rows)
    assert "|" not in table
    assert re.findall(r"(\d of 4 runs), about \d+ (?:s|min|h) left", done.err) == [
        f"{number} of 4 runs" for number in (1, 2, 3)
    ]
    kept = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "multirun.yaml"}
    again = train(*GRID)
    assert again.code == 0
    assert again.out.count("is already finished") == 4
    assert again.err == ""  # nothing was trained, so there is no estimate
    files = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "multirun.yaml"}
    for path, at in kept.items():
        assert files[path] == at or not path.is_file() or path.suffix == ".lock", path
    assert files.keys() == kept.keys()
    # One more seed: finished runs are not repeated.
    asked = []
    monkeypatch.setattr(training, "run", lambda config, *_, **__: asked.append(config) or {})
    wider = train("-m", "setting=grid", "method=none", "seed=0,1,2")
    assert wider.out.count("is already finished") == 2
    assert [config["seed"] for config in asked] == [2]


def test_experiment_grid_with_overridden_axis(train, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "run", lambda config, *_, **__: asked.append(config) or {})
    done = train("experiment=grid", "setting=grid", "method=none", "seed=3")
    assert done.code == 0, done.err
    assert {config["name"].partition("-model")[0] for config in asked} == {
        "none-small-s3", "none-medium-s3", "none-large-s3",
    }  # fmt: skip


def test_none_is_trained_once_for_several_teachers(train, tmp_path):
    done = train("-m", "teacher.name=one,other", "method=none,logit", "trainer.max_epochs=1")
    assert done.code == 0, done.err
    tables = list(tmp_path.glob("outputs/runs/*/results.md"))
    assert len(tables) == 2
    for teacher in ("one", "other"):
        assert f"\nteacher {teacher} (" in done.out  # the title of its table
    # The baseline is trained once and used in both tables.
    assert sorted(run.name.partition("-s0")[0] for run in done.runs) == [
        "logit-small", "logit-small", "none-small",
    ]  # fmt: skip
    for table in tables:
        assert "| none |" in table.read_text()
        rows = csv.DictReader((table.parent / "results.csv").open())
        accuracies = {row["method"]: float(row["test_accuracy"]) for row in rows}
        assert accuracies.keys() == {"none", "logit"}


def test_failed_and_locked_runs_do_not_stop_the_grid_and_are_retried(train, tmp_path, monkeypatch):
    original = training.train_student

    def fails(job, *rest):
        if job.plan.student.seed == 1:
            raise RunError("the loss is not finite at step 3")
        return original(job, *rest)

    monkeypatch.setattr(training, "train_student", fails)
    grid = ("-m", "setting=grid", "method=none", "seed=0,1,2", "trainer.max_epochs=1")
    folder = tmp_path / "outputs" / "runs" / "grid"
    name = "none-small-s0-model.channels_4_8-model.hidden_8"
    with RunDirectory(folder / name).lock():  # as of another process
        done = train(*grid)
    assert done.code == 1
    assert f"another process is working on {name}" in done.err
    assert done.err.count("the loss is not finite at step 3") == 1
    assert statuses(folder) == {"none-small-s1": "failed", "none-small-s2": "finished"}
    assert "failed: the loss is not finite" in (folder / "results.md").read_text()

    monkeypatch.setattr(training, "train_student", original)
    again = train(*grid)
    assert again.code == 0, again.err
    assert list(statuses(folder).values()) == ["finished"] * 3
    assert "failed" not in (folder / "results.md").read_text()


def test_run_without_teacher_is_shared_by_all_teachers(train, tmp_path, monkeypatch):
    def fails(*_):
        raise RunError("it is trained")

    other = ("teacher.model.hidden=24", "setting=another")
    (first,) = train("method=none", "setting=grid").runs
    files = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    again = train("method=none", *other)
    assert again.code == 0
    assert not again.runs
    assert str(first) in again.out
    assert not (tmp_path / "outputs" / "runs" / "another").exists()  # no empty folder is left
    in_a_grid = train("-m", "method=none", *other)
    assert f"is already finished, in {first}" in in_a_grid.out
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()} == files
    # Runs that depend on the teacher, or differ otherwise, are trained.
    (distilled,) = train("method=logit", *other).runs
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_student", fails)
        more = train("method=none", "setting=longer", "trainer.max_epochs=3")
    assert "it is trained" in more.err
    # The table of the other setting contains the baseline and the gain.
    runs = read_runs([distilled.parent])
    assert list(runs["method"]) == ["none", "logit"]
    assert list(runs["folder"]) == [str(first), str(distilled)]
    cells = summarise(runs).set_index("method")
    assert cells.loc["logit", "pairs"] == 1
    expected = runs["test_accuracy"][1] - runs["test_accuracy"][0]
    assert cells.loc["logit", "gain"] == pytest.approx(expected)
    # Its compression ratio refers to the teacher of the table.
    metrics = RunDirectory(distilled).read_metrics()
    assert runs["teacher_parameters"][0] == metrics["teacher_parameters"]
    assert runs["compression_ratio"][0] == pytest.approx(metrics["compression_ratio"])
    # Training the baseline again gives the same student.
    weights = (first / "student.safetensors").read_bytes()
    shutil.rmtree(first)
    (trained,) = train("method=none", *other).runs
    assert (trained / "student.safetensors").read_bytes() == weights


COMMAND = [
    "train.py", "-m", *TINY, "method=none,combined", "student=small", "seed=0", "setting=grid",
    "data=digits", "data.image_size=16", "data.batch_size=100", "trainer.max_epochs=4",
    "trainer.precision=32-true", "+trainer.limit_train_batches=6",
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    done = in_a_new_process(*COMMAND, f"output_dir={root}", f"data_dir={root}/data")
    assert done.code == 0, done.err
    return results(root)


def results(root):
    """Weights, history without speed, and results of every cell."""
    found = {}
    for run in sorted((root / "runs" / "grid").glob("*/")):
        metrics = json.loads((run / "metrics.json").read_text())
        rows = (run / "history.csv").read_text().splitlines()
        found[run.name] = (
            (run / "student.safetensors").read_bytes(),
            [row.rpartition(",")[0] for row in rows],
            {k: v for k, v in metrics.items() if k.endswith("accuracy") or k == "best_epoch"},
        )
    return found


@pytest.mark.parametrize(
    "signals",
    [
        {"none": "SIGKILL", "combined": "SIGINT"},
        pytest.param({"none": "SIGTERM", "combined": "SIGKILL"}, marks=pytest.mark.slow),
    ],
    ids=lambda signals: "-".join(signals.values()),
)
def test_resume_after_kill_gives_the_same_grid(tmp_path, uninterrupted, signals):
    """Interrupted within the first cell, then within the second."""
    command = [*COMMAND, f"output_dir={tmp_path}", f"data_dir={tmp_path}/data"]
    for cell, how in signals.items():
        process = processes.start(*command)
        processes.wait_for(f"runs/grid/{cell}*/checkpoints/last.ckpt", tmp_path, process)
        process.send_signal(signal.Signals[how])
        _, said = process.communicate(timeout=60)
        if how == "SIGKILL":
            assert process.returncode == -signal.SIGKILL
            continue
        assert process.returncode == 128 + signal.Signals[how]
        name = "Ctrl-C" if how == "SIGINT" else how
        last = said.splitlines()[-1]
        assert last.startswith(f"stopped by {name}: {cell}-small-s0")
        assert " is saved at " in last
        assert last.endswith("run the same command again to resume")
        assert "error" not in said
        assert "Traceback" not in said
        assert statuses(tmp_path / "runs" / "grid")[f"{cell}-small-s0"] == "running"
    done = in_a_new_process(*command)
    assert done.code == 0, done.err
    assert "resuming " in done.err
    assert results(tmp_path) == uninterrupted


def test_resume_after_the_last_epoch_only_tests(train, caplog):
    (run,) = train("method=none", "setting=grid").runs
    directory = RunDirectory(run)
    metrics = directory.read_metrics()
    unfinished = ("status", "test_accuracy", "test_accuracy_at_best")
    kept = {key: value for key, value in metrics.items() if key not in unfinished}
    directory.write_metrics({**kept, "status": "running"})
    weights = (run / "student.safetensors").read_bytes()
    done = train("method=none", "setting=grid")
    assert done.code == 0, done.err
    again = directory.read_metrics()
    for key in ("status", "val_accuracy", "test_accuracy", "best_epoch", "test_accuracy_at_best"):
        assert again[key] == metrics[key]
    assert again["images_per_second"] == metrics["images_per_second"]  # not trained again
    assert (run / "student.safetensors").read_bytes() == weights

    # With a damaged checkpoint it is trained again.
    directory.write_metrics({**metrics, "status": "running"})
    (run / "student.safetensors").unlink()
    checkpoint = run / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    done = train("method=none", "setting=grid")
    assert done.code == 0
    assert "is damaged; training restarts" in done.err + caplog.text
    assert (run / "student.safetensors").read_bytes() == weights
    assert directory.read_metrics()["images_per_second"] != metrics["images_per_second"]


def test_checkpoint_write_is_atomic(tmp_path, monkeypatch):
    from kd_lightning.engine.checkpointing import AtomicCheckpoints

    path = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"epoch": 1}, path)

    def dies(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="No space"):
        AtomicCheckpoints().save_checkpoint({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def basic_launcher():
    """Hydra's launcher, as found by its search for plugins, which imports the class anew."""
    return Plugins.instance().class_name_to_class[
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    ]


def launch_in_forks():
    """Replace Hydra's launcher in this process by one that runs every job in its own process."""
    launch = basic_launcher().launch

    def launch_apart(self, job_overrides, initial_job_idx):
        workers = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            worker = os.fork()
            if worker == 0:
                try:
                    launch(self, [overrides], number)
                    os._exit(0)  # as joblib's, even if the run has failed
                finally:
                    os._exit(1)
            workers.append(worker)
        assert [os.waitpid(worker, 0)[1] for worker in workers] == [0] * len(workers)
        return []

    basic_launcher().launch = launch_apart


def assert_one_grid(root):
    """Two runs of one teacher, in the table of the folder."""
    folder = root / "runs" / "grid"
    assert list(statuses(folder).values()) == ["finished"] * 2
    assert len(list((root / "teachers").glob("*/teacher.safetensors"))) == 1
    assert (folder / "results.csv").read_text().count("finished") == 2


def test_jobs_in_several_processes_share_one_teacher(tmp_path):
    process = processes.start(
        "train.py", "-m", *TINY, "method=logit", "seed=0,1", "setting=grid", "data=digits",
        "data.image_size=16", "data.batch_size=128", "trainer.max_epochs=1",
        "+trainer.limit_train_batches=2", f"output_dir={tmp_path}", f"data_dir={tmp_path}/data",
        prepare=launch_in_forks,
    )  # fmt: skip
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert_one_grid(tmp_path)
    table = out.partition("test accuracy in per cent")[2]  # the main process knows the folders
    assert [line.split()[0] for line in table.splitlines() if "(2)" in line] == ["logit"]


def test_a_failure_that_cannot_be_recorded_does_not_end_the_grid(train, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "packed.zip")

    monkeypatch.setattr(cli, "plain", refuse)
    monkeypatch.setattr(record, "record_failure", refuse)
    done = train(*GRID)
    assert (done.code, done.err.count("error: Permission denied: packed.zip")) == (1, 4)
    assert "output_dir" not in done.err


@pytest.mark.slow  # fresh interpreters for the command and its jobs
@pytest.mark.parametrize(
    ("launcher", "setting"),
    [("joblib", "hydra.launcher.n_jobs=2"), ("submitit_local", "hydra.launcher.timeout_min=5")],
)
def test_joblib_and_submitit_jobs_share_one_teacher(tmp_path, launcher, setting):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    folder = tmp_path / "runs" / "grid"
    folder.mkdir(parents=True)
    # As if just drawn: no figures before the end.
    (folder / ".results.json").write_text(json.dumps({"drawn": time.time()}))
    done = in_a_new_process(
        "train.py", "-m", *TINY, f"hydra/launcher={launcher}", setting, "method=logit",
        "seed=0,1", "setting=grid", "data=digits", "trainer.max_epochs=1",
        f"output_dir={tmp_path}", f"data_dir={tmp_path}/data",
        fresh=launcher == "joblib",  # its workers wait forever in a fork
    )  # fmt: skip
    assert done.code == 0, done.err
    assert_one_grid(tmp_path)
    if launcher == "joblib":  # threads are divided among the workers
        cores = len(os.sched_getaffinity(0))
        devices = {json.loads(p.read_text())["device"] for p in tmp_path.rglob("metrics.json")}
        threads = {int(d.rsplit(", ", 1)[1].split()[0]) for d in devices}
        assert threads == {max(1, cores // 2)}
