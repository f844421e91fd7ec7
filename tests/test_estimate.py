"""The estimate of time, disk and memory."""

import re
import runpy
import sys

import pytest
import torch
from conftest import REPOSITORY

from kd_lightning.storage.rows import Rows

SCRIPT = str(REPOSITORY / "scripts" / "estimate.py")
COMMAND = (
    "data=digits",
    "student=small",
    "teacher=resnet9",
    "data.views=4",
    "trainer.max_epochs=6",
)


def estimate(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(
        sys, "argv", [SCRIPT, "--images", "1000000", "--seconds", "0", *COMMAND, *arguments]
    )
    runpy.run_path(SCRIPT, run_name="__main__")
    return capsys.readouterr().out


def test_disk_follows_from_images_views_and_rows(monkeypatch, capsys, tmp_path):
    said = estimate(monkeypatch, capsys, "trainer.precision=32-true")
    row = Rows(tmp_path, {}, 1_000_000, (10,), torch.float16).file_size
    assert f"{4 * row / 1e9:.2f} GB" in re.search(r"logits on 4 views\s+(.*)", said)[1]
    few = estimate(monkeypatch, capsys, "trainer.max_epochs=2")  # fewer epochs than views
    assert f"{2 * row / 1e9:.2f} GB" in re.search(r"logits on 2 views\s+(.*)", few)[1]


def test_fifty_reduced_views_of_imagenet_fit_into_five_gigabytes(monkeypatch):
    script = runpy.run_path(SCRIPT)
    config = {"data": {"num_classes": 1000}, "remember": {"top_k": "auto", "dtype": "float16"}}
    assert 50 * script["bytes_per_view"](config, 1_281_167) == pytest.approx(4.87e9, rel=1e-3)


def test_mistakes_are_reported_in_one_line(monkeypatch, capsys):
    for given in ("student=nonsense", "data.num_classes=null"):
        with pytest.raises(SystemExit) as stop:
            estimate(monkeypatch, capsys, given)
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_teacher_is_measured_at_its_own_image_size(monkeypatch, capsys):
    sizes = []
    script = runpy.run_path(SCRIPT)
    monkeypatch.setitem(
        script["speed"].__globals__, "materialize", lambda model, size, _: sizes.append(size)
    )
    config = script["api"].compose("data=digits", "teacher=resnet9", "teacher.image_size=64")
    config["data"]["batch_size"] = 2
    script["speed"](config, "teacher", 0, train=False)
    assert sizes == [64]
