"""The moving average of the student as its teacher."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn

from kd_lightning import api
from kd_lightning.config.checks import check
from kd_lightning.data.views import Normalization
from kd_lightning.distill.mean_teacher import MeanTeacher
from kd_lightning.engine.callbacks.following import FollowStudent
from kd_lightning.errors import InputError
from kd_lightning.models import ConvNet

HALF = Normalization((0.5,) * 3, (0.5,) * 3)
SMALL = ("student.model.channels=[4,8]", "student.model.hidden=8")
FAST = (
    "trainer.accelerator=cpu", "trainer.max_epochs=2", "optimizer.lr=0.05", "pictures=false",
)  # fmt: skip


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))


def test_average_by_hand():
    student, teacher = network(), MeanTeacher(network(1), HALF, decay=0.75)
    values = [1.0, 3.0, 5.0, 9.0, 1.0]
    # The mean of the first steps, while it is the shorter memory: 1, 2, 3, then 3/4 and 1/4.
    expected = [1.0, 2.0, 3.0, 4.5, 3.625]
    for step, (value, mean) in enumerate(zip(values, expected, strict=True), start=1):
        with torch.no_grad():
            for tensor in [*student.parameters(), student[1].running_mean]:
                tensor.fill_(value)
        student[1].num_batches_tracked.fill_(step)
        teacher.follow(student, step)
        for tensor in [*teacher.model.parameters(), teacher.model[1].running_mean]:
            torch.testing.assert_close(tensor, torch.full_like(tensor, mean))
        assert teacher.model[1].num_batches_tracked == step


def test_shared_weights_are_averaged_once():
    def tied():
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        second.weight = first.weight
        return nn.Sequential(first, second)

    student, teacher = tied(), MeanTeacher(tied(), HALF, decay=0.5)
    for step, value in enumerate((0.0, 8.0), start=1):
        nn.init.constant_(student[0].weight, value)
        teacher.follow(student, step)
    torch.testing.assert_close(teacher.model[1].weight, torch.full((2, 2), 4.0))


def test_processes_average_the_same_buffers(monkeypatch):
    def broadcast(buffer, rank):
        buffer.fill_(4 + rank)  # as rank 0 has it

    monkeypatch.setattr(distributed, "broadcast", broadcast)
    student, teacher = network(), MeanTeacher(network(1), HALF, decay=0.5)
    trainer, module = SimpleNamespace(world_size=2, global_step=1), SimpleNamespace(student=student)
    FollowStudent(teacher).on_train_batch_end(trainer, module, None, None, 0)
    assert teacher.model[1].running_mean.tolist() == [4, 4]


def test_outputs_follow_the_weights():
    student = ConvNet([4, 8], 8, num_classes=3, image_size=16)
    teacher = MeanTeacher(ConvNet([4, 8], 8, num_classes=3, image_size=16), HALF, decay=0.5)
    teacher.read((), True, 3)
    teacher.prepare(torch.device("cpu"), torch.channels_last, None)
    images = torch.randn(6, 3, 16, 16)
    before = teacher(images)
    teacher.follow(student, 1)
    assert not torch.equal(teacher(images), before)
    torch.testing.assert_close(teacher(images), student(images))
    assert teacher.fingerprint() is None


def test_student_learns_from_its_average(train, tmp_path):
    arguments = (*SMALL, *FAST, "trainer.max_epochs=1")
    done = train(*arguments, "method=logit", "teacher=mean", "teacher.decay=0.9", tiny=False)
    assert done.code == 0, done.err
    metrics = done.metrics
    assert metrics["teacher"] == "mean"
    assert metrics["teacher_parameters"] == metrics["parameters"]
    assert metrics["teacher_val_accuracy"] is None  # not before the training
    assert "teacher mean" in done.out
    assert 0 < metrics["agreement"] <= 1
    assert not list(tmp_path.glob("outputs/teachers/*/teacher.safetensors"))
    assert not list(tmp_path.glob("outputs/teachers/remembered/*/*.rows"))
    plain = train(*arguments, "method=none", tiny=False)
    weights = [load_file(run.runs[0] / "student.safetensors") for run in (done, plain)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resume_is_bit_exact(folder, tmp_path, monkeypatch):
    from kd_lightning.engine.callbacks.following import FollowStudent

    def run(place):
        return api.run(
            "data=folder", f"data.root={folder}", "data.image_size=16", "data.batch_size=16",
            "data.padding=2", f"output_dir={tmp_path / place}", *SMALL, *FAST, "method=logit",
            "teacher=mean", "teacher.decay=0.9",
        )  # fmt: skip

    whole = run("whole")
    original = FollowStudent.on_train_batch_end

    def stop(self, trainer, *others):
        original(self, trainer, *others)
        if trainer.current_epoch == 1:
            raise MemoryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(FollowStudent, "on_train_batch_end", stop)
        with pytest.raises(MemoryError):
            run("parts")
    parts = run("parts")
    one, other = (load_file(f"{result['folder']}/student.safetensors") for result in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole["test_accuracy"] == parts["test_accuracy"]
    assert json.dumps(whole["agreement"]) == json.dumps(parts["agreement"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["teacher.decay=1"], "teacher.decay must be above 0 and below 1"),
        (["teacher.decay=often"], "teacher.decay must be above 0 and below 1"),
        (["method=simkd"], "teacher.decay makes the student its own teacher"),
        (["teacher.checkpoint=x.pt"], "has no checkpoint"),
        (["teacher.members=[{seed: 0},{seed: 1}]"], "cannot be in an ensemble"),
    ],
)
def test_invalid_settings_are_rejected(arguments, words):
    with pytest.raises(InputError) as error:
        check(api.compose("method=logit", "data=digits", "teacher=mean", *arguments))
    assert words in str(error.value)
