"""Composing, running and using a student from Python."""

import pytest
import torch
from conftest import TINY

from kd_lightning import api
from kd_lightning.errors import InputError
from kd_lightning.storage.run_directory import RunDirectory


@pytest.fixture
def given(folder, tmp_path):
    return (
        *TINY, "method=none", "data=folder", f"data.root={folder}", "data.image_size=16",
        "data.padding=2", "data.batch_size=16", "trainer.max_epochs=3",
        f"output_dir={tmp_path / 'outputs'}", f"data_dir={tmp_path / 'data'}",
    )  # fmt: skip


def test_run_uses_the_folder_of_the_command_line(given, train, folder):
    metrics = api.run(*given)
    assert metrics["status"] == "finished"
    assert RunDirectory(metrics["folder"]).read_metrics()["name"] == metrics["name"]
    # The command line finds the run of the API.
    done = train("trainer.max_epochs=3", "method=none", f"setting={metrics['setting']}")
    assert "already finished" in done.out
    assert api.run(*given)["train_seconds"] == metrics["train_seconds"]  # not trained again


def test_student_predicts_class_names_of_files_and_pixels(given, folder, capfd):
    student = api.load_student(api.run(*given, "optimizer.lr=0.05")["folder"])
    said = capfd.readouterr()
    assert said.out == ""
    assert [line for line in said.err.splitlines() if ": epoch" not in line] == []  # progress
    assert student.classes == ("class0", "class1", "class2")
    assert not student.model.training
    files = sorted((folder / "test").glob("*/*"))
    predicted = student.predict(files)
    accuracy = sum(p == f.parent.name for p, f in zip(predicted, files, strict=True)) / len(files)
    metrics = api.run(*given, "optimizer.lr=0.05")
    assert accuracy == pytest.approx(metrics["test_accuracy"])
    pixels = torch.rand(2, 3, 16, 16)
    probabilities = student.probabilities(pixels)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2))
    temperature = metrics["temperature"]
    expected = (student.model((pixels - 0.5) / 0.5) / temperature).softmax(dim=1)
    torch.testing.assert_close(probabilities, expected)


def test_invalid_input_raises_input_error(given):
    with pytest.raises(InputError, match="max_epochs"):
        api.compose("trainer.max_epoch=1")
    with pytest.raises(InputError, match="not a run directory"):
        api.load_student("nowhere")


@pytest.mark.parametrize("given", ["student=smal", "seed=0,1"])
def test_invalid_override_is_an_input_error(given):
    with pytest.raises(InputError, match=given):
        api.compose(given)
