"""Scripts: invalid arguments in one sentence, nothing of the user's replaced, progress shown."""

import argparse
import os
import re
import runpy
import sys

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY

from kd_lightning import api
from kd_lightning.errors import InputError
from kd_lightning.reports.card_file import write_card
from kd_lightning.reports.documents import write_report
from kd_lightning.reports.runs import read_runs, run_folders
from kd_lightning.terminal import positive


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "x", "²"])
def test_number_below_one_is_rejected(text):
    assert positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        positive(text)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("inference_speed", ["RUN", "--rounds", "0"]),
        ("inference_speed", ["RUN", "--batch-size", "-1"]),
        ("inference_speed", ["RUN", "--images", "nowhere.png"]),
        ("precision", ["--rounds", "0"]),
        ("tune", ["--trials", "0"]),
        ("estimate", ["--images", "0"]),
        ("estimate", ["--images", "9", "--decoded-per-second", "0"]),
    ],
)
def test_invalid_argument_is_reported_before_anything_is_loaded(
    monkeypatch, capsys, script, arguments
):
    for name in ("load_student", "compose"):
        monkeypatch.setattr(api, name, lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, script, *arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_progress_of_the_measurement_is_on_standard_error(capsys):
    script = runpy.run_path(str(REPOSITORY / "scripts" / "inference_speed.py"))
    rates = script["best_rates"]({"loop": (10, lambda: None)}, 3)
    assert rates["loop"] > 0
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 3
    assert not out


def run(monkeypatch, script, *arguments):
    path = str(REPOSITORY / "scripts" / f"{script}.py")
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    runpy.run_path(path, run_name="__main__")


# --- reports and cards ---------------------------------------------------------------------------


def test_table_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "results.csv").write_text("a\n")
    monkeypatch.setattr(pd, "read_csv", refuse)
    with pytest.raises(InputError, match=r"results\.csv cannot be read .*: Permission denied"):
        read_runs([tmp_path / "results.csv"])


def test_folder_without_permission_is_named(tmp_path, monkeypatch, caplog):
    def refuse(path):
        if str(path).endswith("theirs"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    scandir = os.scandir
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").touch()
    monkeypatch.setattr(os, "scandir", refuse)
    assert run_folders([tmp_path]) == [tmp_path / "mine"]
    assert caplog.messages == [f"{tmp_path / 'theirs'} cannot be read: Permission denied"]


def test_report_on_nothing_keeps_an_earlier_one(tmp_path):
    (tmp_path / "results.md").write_text("earlier")
    assert write_report([tmp_path / "results"], tmp_path, page=True).empty
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]
    assert (tmp_path / "results.md").read_text() == "earlier"


def test_edited_card_is_kept(tmp_path):
    card = tmp_path / "README.md"
    write_card(card, "# Größe\n")
    write_card(card, "# Second\n\nText.\n")  # generated: replaced
    assert card.read_text().startswith("# Second\n\nText.\n")
    written = card.read_text()
    for edited in (written.replace("Text", "My text"), f"{written}\nMore.\n", "# My own\n", ""):
        card.write_text(edited)
        with pytest.raises(InputError, match="--overwrite"):
            write_card(card, "# Third\n")
        assert card.read_text() == edited
    write_card(card, "# Third\n", overwrite=True)
    write_card(card, "# Fourth\n")
    assert card.read_text().startswith("# Fourth\n")


# --- estimates -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def estimate():
    return runpy.run_path(str(REPOSITORY / "scripts" / "estimate.py"))


GIVEN = ("data=digits", "method=logit", "data.views=2", "trainer.max_epochs=2")


def estimated(estimate, monkeypatch, capsys, *arguments, rates=None):
    """The figures of an estimate, with these images per second of student and teachers."""
    path = str(REPOSITORY / "scripts" / "estimate.py")
    monkeypatch.setattr(sys, "argv", [path, "--images", "1000000", *GIVEN, *arguments])
    if rates:
        speeds = iter(rates)
        monkeypatch.setitem(estimate["main"].__globals__, "speed", lambda *_, **__: next(speeds))
    estimate["main"]()
    return capsys.readouterr().out


def test_members_of_an_ensemble_add_up(estimate, monkeypatch, capsys):
    def figures(*arguments, rates):
        said = estimated(estimate, monkeypatch, capsys, *arguments, rates=rates)
        disk = float(re.search(r"logits on 2 views +([\d.]+) GB", said)[1])
        return disk, int(re.search(r"teacher: (\d+) images/s", said)[1])

    disk, speed = figures("teacher=convnet", rates=[100, 60])
    assert speed == 60
    ensemble = ("teacher=ensemble", "teacher.members=[resnet9,resnet20]")
    assert figures(*ensemble, rates=[100, 60, 30]) == (pytest.approx(2 * disk, abs=0.02), 20)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_speed_is_measured_in_the_precision_of_the_run(estimate, monkeypatch, precision):
    dtypes = []

    class Network(torch.nn.Linear):
        def forward(self, images):
            logits = super().forward(images.flatten(1))
            dtypes.append(logits.dtype)
            return logits

    monkeypatch.setitem(estimate["speed"].__globals__, "build", lambda *_: Network(3 * 32 * 32, 10))
    config = api.compose(
        *GIVEN, f"trainer.precision={precision}", "data.batch_size=2", "+trainer.num_nodes=2",
        "data.image_size=32", "trainer.accelerator=cpu",
    )  # fmt: skip
    expected = torch.float32 if precision == "32-true" else torch.bfloat16
    for part in ("student", "teacher"):
        estimate["speed"](config, part, 0, train=part == "student")
        assert dtypes[-1] == expected


def test_teacher_that_cannot_be_estimated_is_named(estimate, monkeypatch, capsys):
    with pytest.raises(InputError, match=r"teacher\.decay"):
        estimated(estimate, monkeypatch, capsys, "teacher=mean", rates=[1, 1])
    with pytest.raises(InputError, match=r"trainer\.precision must be one of"):
        estimated(estimate, monkeypatch, capsys, "trainer.precision=8-bit", rates=[1, 1])
