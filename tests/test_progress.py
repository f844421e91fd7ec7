"""Progress output, to any terminal, file or pipe."""

import io
import os
import pty
import re
import select
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import processes
import pytest
from conftest import REPOSITORY, TINY, in_a_new_process
from omegaconf import OmegaConf

from kd_lightning import cli, terminal
from kd_lightning.engine.callbacks import progress
from kd_lightning.engine.callbacks.progress import ProgressBar
from kd_lightning.reports.summary import about, print_summary
from kd_lightning.workflows import grid as sweep
from kd_lightning.workflows.grid import CompletedRun, cells_of, time_left


@pytest.fixture
def clock(monkeypatch):
    """A manually advanced clock."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def train(bar, clock, epochs, seconds, rank_zero=True, validated=1):
    """Simulate a training with 10 steps per epoch and these seconds per epoch."""
    trainer = SimpleNamespace(
        is_global_zero=rank_zero, global_step=0, max_epochs=epochs, current_epoch=0,
        estimated_stepping_batches=10 * epochs,
        callback_metrics={"val/accuracy": 0.712, "images_per_second": 6120.4},
    )  # fmt: skip
    bar.on_train_start(trainer, None)
    for epoch in range(epochs):
        trainer.current_epoch, trainer.global_step = epoch, 10 * (epoch + 1)
        clock.seconds += seconds
        if (epoch + 1) % validated == 0:
            bar.on_validation_start(trainer, None)
        bar.on_train_epoch_end(trainer, None)
    bar.on_train_end(trainer, None)


def test_one_line_per_epoch_without_a_terminal(capsys, clock):
    train(ProgressBar("combined-small-s0"), clock, epochs=3, seconds=60)
    assert capsys.readouterr().err.splitlines() == [
        "combined-small-s0: epoch 1/3, val 71.20 %, 6,120 images/s, 2 min left",
        "combined-small-s0: epoch 2/3, val 71.20 %, 6,120 images/s, 1 min left",
        "combined-small-s0: epoch 3/3, val 71.20 %, 6,120 images/s",
    ]


def test_accuracy_of_an_earlier_epoch_is_not_repeated(capsys, clock):
    train(ProgressBar("x"), clock, epochs=3, seconds=60, validated=2)
    lines = capsys.readouterr().err.splitlines()
    assert ["val" in line for line in lines] == [False, True, False]


def test_short_epochs_are_rate_limited(capsys, clock):
    train(ProgressBar("x"), clock, epochs=300, seconds=0.1)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 7
    assert "epoch 300/300" in lines[-1]


def test_only_rank_0_prints(capsys, clock):
    train(ProgressBar("x"), clock, epochs=3, seconds=60, rank_zero=False)
    assert capsys.readouterr().err == ""


def test_progress_bar_needs_a_capable_terminal(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.watched(error=True)
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.watched(error=True)
    screen.isatty = lambda: False
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # set by CI services
    assert not terminal.watched(error=True)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (41, "41 s"), (59.9, "60 s"), (2400, "40 min"), (3600, "1 h"),
     (12_000, "3 h 20 min"), (190_000, "2 d 4 h")],
)  # fmt: skip
def test_format_of_durations(seconds, words):
    assert about(seconds) == words


def test_remaining_time_is_estimated_from_trained_runs():
    cells = ["small", "large"] * 3
    done = [CompletedRun("x", 0, 10.0), CompletedRun("x", 1, 100.0)]
    assert time_left(cells, done, elapsed=110) == 2 * 10 + 2 * 100
    # Already finished runs count as done, but not for the estimate.
    before = [CompletedRun("x", 0, 0.0), CompletedRun("x", 1, 0.0), CompletedRun("x", 2, 10.0)]
    assert time_left(cells, before, elapsed=10) == 3 * 10
    # Two parallel runs take half the time.
    assert time_left(cells, done, elapsed=55) == (2 * 10 + 2 * 100) / 2


def grid(task, **sweeper):
    sweeper = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", **sweeper}
    return OmegaConf.create({"hydra": {"sweeper": sweeper, "overrides": {"task": task}}})


def test_runs_of_a_grid_match_the_sweeper(monkeypatch):
    monkeypatch.setattr(
        sweep.GlobalHydra, "instance", lambda: SimpleNamespace(config_loader=lambda: None)
    )
    cells = cells_of(grid(["method=a,b", "seed=range(0,3)", "x=1"], params={"student": "s,l"}))
    assert len(cells) == 12
    assert len(set(cells)) == 4  # seeds of a cell are equivalent
    # The command line overrides the experiment.
    assert len(cells_of(grid(["seed=0"], params={"seed": "0,1,2"}))) == 1
    assert cells_of(grid(["seed=0,1"], _target_="optuna.Sweeper")) == []
    assert cells_of(grid(["seed=((("])) == []


METRICS = {
    "method": "logit", "student": "ärmel[/]", "data": "数字", "seed": 0, "teacher": "é±",
    "teacher_parameters": 10, "parameters": 5, "teacher_val_accuracy": 0.5,
    "teacher_test_accuracy": 0.5, "val_accuracy": 0.4, "test_accuracy": 0.4, "best_epoch": 1,
    "epochs": 2, "best_val_accuracy": 0.4, "test_accuracy_at_best": 0.4, "compression_ratio": 2.0,
    "agreement": None, "train_seconds": 3, "images_per_second": 9, "precision": "32-true",
    "device": "Ryzen™ 7",
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_tables_can_be_printed_in_any_encoding(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    print_summary(METRICS, "runs/caf\udce9")  # a file name that is not UTF-8
    terminal.say(terminal.table_of(pd.DataFrame({"method": ["größe"], "ß": ["1.00 ± 0.20"]})))
    text = raw.getvalue().decode(encoding)
    assert "[/]" in text  # not interpreted as markup
    assert "40.00 %" in text
    lines = [line for line in text.splitlines() if line[:1] in "|+┃│┏┡└"]
    assert len({len(line) for line in lines if "?" not in line and "数" not in line}) == 1
    if encoding == "ascii":
        assert "armel" in text
        assert "1.00 +- 0.20" in text


def test_broken_pipe_is_not_a_failure():
    done = subprocess.run(
        f"{sys.executable} -c \"from kd_lightning.terminal import say\nfor n in range(9999):"
        ' say(str(n))" | head -1',
        shell=True, capture_output=True, text=True, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_run_on_an_ascii_terminal(folder, tmp_path):
    (folder / "train" / "class0").rename(folder / "train" / "äöü")
    (folder / "test" / "class0").rename(folder / "test" / "äöü")
    done = in_a_new_process(
        "train.py", "-m", *TINY, "method=none", "data=folder", f"data.root={folder}",
        "data.image_size=16", "data.batch_size=16", "trainer.max_epochs=1",
        f"output_dir={tmp_path / 'outputs'}", f"data_dir={tmp_path}",
        LC_ALL="C", PYTHONIOENCODING="ascii", TERM="dumb",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.isascii()
    assert "| student small" in done.out


def in_a_terminal(*arguments, columns=80):
    """Run train.py in a pseudo-terminal; return the output."""
    ours, theirs = pty.openpty()
    process = processes.start(
        "train.py", *arguments, terminal=os.ttyname(theirs), TERM="xterm", COLUMNS=str(columns)
    )
    text = b""
    while select.select([ours], [], [], 0.1)[0] or process.poll() is None:
        if select.select([ours], [], [], 0)[0]:
            text += os.read(ours, 4096)
    for end in (ours, theirs):
        os.close(end)
    return process.wait(), text.decode()


def test_final_table_of_a_grid_fits_the_terminal(tmp_path):
    arguments = (
        "-m", *TINY, "method=none", "data=digits", "student.name=a,b", "trainer.max_epochs=1",
        "data.image_size=16", "data.batch_size=512", "setting=grid", f"output_dir={tmp_path}",
        f"data_dir={tmp_path}/d",
    )  # fmt: skip
    code, text = in_a_terminal(*arguments)
    assert code == 0, text
    table = text.partition("test accuracy in per cent")[2]
    assert "──" in table
    assert "| " not in table
    assert ": epoch" not in text  # there is a bar


def test_wide_table_has_one_row_per_cell(tmp_path, monkeypatch, capsys):
    from reported_runs import PARAMETERS, write_run

    for number in range(12):
        student = f"a-student-with-a-long-name-{number}"
        monkeypatch.setitem(PARAMETERS, student, number + 1)
        write_run(tmp_path, "none", student, 0, 0.5)
    monkeypatch.setattr(terminal, "watched", lambda error=False: True)
    monkeypatch.setenv("COLUMNS", "80")
    sweep.show([tmp_path])
    out = capsys.readouterr().out
    assert all(f"a-student-with-a-long-name-{number} " in out for number in range(12))
    out = re.sub(r"\x1b\[[0-9;]*m", "", out)
    lines = [line for line in out.splitlines() if not line.startswith("gains")]
    assert max(len(line) for line in lines) <= 80


def test_stopped_is_not_an_error(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(cli, "_app", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    said = capsys.readouterr().err
    assert "error" not in said
    assert said.count("\n") == 1
