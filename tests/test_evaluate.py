"""Evaluation: of runs that were trained by several processes, and of a part of the images."""

import shutil

import pytest
import torch
import yaml
from conftest import FOLDER, TINY, write_folder

from kd_lightning import api
from kd_lightning.data.splits import evaluation_order
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows.evaluate import evaluate
from kd_lightning.workflows.jobs import prepare_again
from kd_lightning.workflows.measure import _channels_last


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was tested on the first batch of three, of four images each."""
    root = tmp_path_factory.mktemp("evaluate")
    images = write_folder(root / "images")
    result = api.run(
        *TINY, *FOLDER, f"data.root={images}", f"data_dir={root}", f"output_dir={root}/outputs",
        "method=none", "student=small", "trainer.max_epochs=1", "data.eval_batch_size=4",
        "+trainer.limit_test_batches=1", "+trainer.limit_val_batches=1", "pictures=false",
    )  # fmt: skip
    return RunDirectory(result["folder"])


@pytest.mark.parametrize(
    "trainer",
    [
        {"strategy": "ddp", "devices": "auto", "num_nodes": 2},
        {"strategy": "ddp", "devices": 2},
        {"devices": [1, 3], "num_nodes": 4},
    ],
)
def test_run_of_several_processes_is_evaluated_in_one(run, tmp_path, trainer):
    copy = shutil.copytree(run.path, tmp_path / "run")
    config = run.read_config()
    config["trainer"] |= trainer
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert evaluate(copy) == evaluate(run.path)
    assert _channels_last(config, torch.device("cpu")) in (True, False)  # without an error
    assert prepare_again(RunDirectory(copy)).processes == 1  # to check or pack its cache


def test_evaluation_repeats_the_part_that_was_tested(run):
    result = evaluate(run.path)
    assert result["accuracy"] == pytest.approx(result["recorded"], abs=1e-7)
    assert sum(map(int, ",".join(_rows(run.path / "confusion.csv")).split(","))) == 4


def test_part_of_the_images_is_of_all_classes(run):
    """The first batch in the order of the folder would be four images of one class."""
    counts = [sum(map(int, row.split(","))) for row in _rows(run.path / "confusion.csv")]
    assert sum(counts) == 4
    assert sum(count > 0 for count in counts) > 1


def _rows(table):
    return table.read_text().splitlines()[1:]


@pytest.mark.parametrize(
    ("limit", "changed"), [(1.0, False), (4, False), (9, False), (3, True), (1, True), (0.5, True)]
)
def test_order_of_evaluation_is_changed_for_a_part_only(limit, changed):
    images = torch.arange(100, 110)
    order = evaluation_order(images, 3, limit)
    assert order.equal(images) != changed
    assert order.sort().values.equal(images)
    assert order.equal(evaluation_order(images, 3, limit))
