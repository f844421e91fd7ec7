"""The progress of a training is kept if folders are moved or written to, or a start fails."""

import shutil
import warnings

import pytest
from conftest import FOLDER, TINY, write_folder
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_lightning import api
from kd_lightning.config.naming import config_key
from kd_lightning.engine.checkpointing import MovableCheckpoints
from kd_lightning.errors import InputError
from kd_lightning.storage.identity import source_sha256, stamps
from kd_lightning.storage.run_directory import LAST, RunDirectory
from kd_lightning.storage.teacher_store import StoredTeacher
from kd_lightning.workflows import student
from kd_lightning.workflows.jobs import prepare
from kd_lightning.workflows.record import begin_record, record_failure, record_teachers

BEST = {"filename": "best", "monitor": "val/accuracy", "mode": "max"}


@pytest.mark.parametrize("kind", [MovableCheckpoints, ModelCheckpoint])
def test_best_score_is_kept_if_the_folder_is_moved(tmp_path, kind):
    saved = kind(tmp_path / "before", **BEST)  # Lightning's: of earlier versions
    saved.best_model_score = 0.5
    saved.best_model_path = saved.kth_best_model_path = str(tmp_path / "before" / "best.ckpt")
    saved.best_k_models = {saved.best_model_path: 0.5}
    restored = MovableCheckpoints(tmp_path / "after", **BEST)
    assert restored.state_key == saved.state_key
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored.load_state_dict(saved.state_dict())
    here = str(tmp_path / "after" / "best.ckpt")
    assert restored.best_model_score == 0.5
    assert restored.best_model_path == restored.kth_best_model_path == here
    assert restored.best_k_models == {here: 0.5}
    assert restored.last_model_path == ""


def test_incomplete_checkpoints_of_a_killed_training_are_removed(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / ".last.ckpt.0123abcd.partial").touch()
    config = api.compose(*TINY, "data=digits", "method=none", f"output_dir={tmp_path / 'outputs'}")
    student.run(config, tmp_path / "run")
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}


def test_folder_that_a_callback_writes_to_is_not_an_input(tmp_path):
    written, read = tmp_path / "written", tmp_path / "weights.json"
    read.write_text("[1]")
    node = {"callbacks": {"x": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
                                "dirpath": str(written), "weights": str(read)}}}  # fmt: skip
    config = {"data_dir": str(tmp_path / "data"), **node}
    before = source_sha256(node), stamps(config)
    written.mkdir()
    (written / "epoch=1.ckpt").write_text("weights")
    assert (source_sha256(node), stamps(config)) == before
    read.write_text("[2]")
    assert source_sha256(node) != before[0]
    assert stamps(config) != before[1]


def test_moved_data_dir_is_the_same_configuration(tmp_path):
    for data in (("data=cifar10",), ("data=folder", "data.root=images")):
        first, second, other = (
            api.compose(*data, f"data_dir={tmp_path / name}", *more)
            for name, more in (("a", ()), ("b", ()), ("a", ("data.root=elsewhere",)))
        )
        assert config_key(first) == config_key(second) != config_key(other)
    images = (
        api.compose("data=folder", f"data.root={tmp_path / name}", f"data_dir={tmp_path / name}")
        for name in "ab"
    )
    assert len({config_key(config) for config in images}) == 2
    assert config_key(api.compose()) == config_key(api.compose("data_dir=data"))


def test_run_resumes_with_another_data_dir(tmp_path, caplog):
    images = write_folder(tmp_path / "images")

    def run(place):
        config = api.compose(
            *FOLDER, *TINY, f"data.root={images}", "method=none", f"data_dir={place}",
            f"output_dir={tmp_path / 'outputs'}",
        )  # fmt: skip
        return student.run(config, tmp_path / "run")

    first = run(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert run(tmp_path / "b")["config_key"] == first["config_key"]
    assert "starting a new one" not in caplog.text


def test_student_does_not_resume_with_other_teacher_weights(tmp_path, caplog):
    directory = RunDirectory(tmp_path)
    last = tmp_path / "checkpoints" / LAST
    first, other = (StoredTeacher(tmp_path, "key", {}, sha256) for sha256 in "ab")
    record = {}
    assert record_teachers(record, (first, None), directory)  # before the first training
    assert directory.read_metrics() == record
    last.parent.mkdir()
    last.touch()
    assert record_teachers({}, (other, None), directory)  # of an earlier version, without hashes
    assert record_teachers(record, (first, None), directory)
    assert last.exists()
    assert not record_teachers(record, (other, None), directory)
    assert not last.exists()
    assert "had a teacher with other weights; starting a new one" in caplog.text
    assert record_teachers(record, (other, None), directory)


def test_interrupted_run_of_a_grid_survives_a_failed_start(tmp_path, caplog):
    config = api.compose(*TINY, "data=digits", "method=none", f"output_dir={tmp_path}")
    directory = RunDirectory(tmp_path / "run")
    begun, _ = begin_record(prepare(config), directory, "")
    record_failure(config, directory.path, InputError("the disk is not mounted"))
    failed = directory.read_metrics()
    assert failed == {**begun, "status": "failed", "error": "the disk is not mounted"}
    (directory.path / "checkpoints").mkdir()
    (directory.path / "checkpoints" / LAST).touch()
    assert begin_record(prepare(config), directory, "") == (begun, True)
    assert "starting a new one" not in caplog.text
    other = api.compose(*TINY, "data=digits", "method=none", f"output_dir={tmp_path}", "seed=1")
    assert not begin_record(prepare(other), directory, "")[1]
    assert "of another configuration; starting a new one" in caplog.text
    assert not (directory.path / "checkpoints" / LAST).exists()
