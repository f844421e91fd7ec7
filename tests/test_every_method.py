"""Every method as a whole: resumed within an epoch, with cached targets, in two processes."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, write_folder
from safetensors.torch import load
from test_main_job import METHODS, SIMKD
from test_ranks import TWO, results, train
from test_resume import Ask, left
from torch import nn

from kd_lightning import api
from kd_lightning.errors import Stopped
from kd_lightning.workflows import student as training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("method", [*METHODS, "crd with memory"]),
]
WIDTH_2 = "{_target_: kd_lightning.models.ResNet9, width: 2, num_classes: '${data.num_classes}'}"


def settings(method):
    name, _, memory = method.partition(" with ")
    wrapper = [part for part in SIMKD if part.startswith("method.")]
    teacher = (f"teacher.model={WIDTH_2}", "teacher.layers=[stage1,stage2]", *wrapper)
    bank = ("method.terms.crd.memory=true", "method.terms.crd.negatives=8")
    return (f"method={name}", *(teacher if name == "simkd" else ()), *(bank if memory else ()))


def configuration(root, method, *more):
    images = root / "images"
    return api.compose(
        "data=folder", f"data.root={images if images.exists() else write_folder(images)}",
        "data.image_size=16", "data.padding=2", "data.batch_size=7", *TINY,
        "trainer.max_epochs=3", "trainer.precision=32-true", f"output_dir={root / 'outputs'}",
        f"data_dir={root / 'data'}", *settings(method), *more,
    )  # fmt: skip


def test_resume_within_an_epoch_is_bit_identical(tmp_path, method):
    config = configuration(tmp_path, method)
    training.run(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        training.run(config, tmp_path / "run", callbacks=[Ask(8)])  # of three epochs of 5 batches
    training.run(config, tmp_path / "run")
    assert left(tmp_path / "run") == left(tmp_path / "whole")


def test_cached_targets_give_the_student_of_computed_ones(tmp_path, method):
    students = []
    for name, remember in (("live", "remember.disk_gb=0"), ("cached", "remember.dtype=float32")):
        config = configuration(tmp_path, method, "data.views=1", remember)
        training.run(config, tmp_path / name)
        students.append((tmp_path / name / "student.safetensors").read_bytes())
    assert students[0] == students[1]


def normalize_each_image():
    """Train without the statistics of a batch, which are those of a process's own part."""

    def forward(self, x):
        return F.group_norm(x, 1, self.weight, self.bias) if self.training else before(self, x)

    before, nn.BatchNorm2d.forward = nn.BatchNorm2d.forward, forward


def test_two_processes_train_the_same_student_as_one(tmp_path, method):
    for name, arguments in (("one", ()), ("two", TWO)):
        train(tmp_path / name, *settings(method), *arguments, prepare=normalize_each_image)
    one, weights, _ = results(tmp_path / "one")
    two, same_weights, _ = results(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    same_weights = load(same_weights)
    for name, weight in load(weights).items():
        torch.testing.assert_close(same_weights[name], weight, rtol=1e-3, atol=1e-4)
