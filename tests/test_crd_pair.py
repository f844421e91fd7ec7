"""`experiment=crd_pair`: the protocol of the literature on CIFAR-100, for any pair."""

import pytest
import torch
import torch.nn.functional as F
from conftest import write_folder

from kd_lightning import api
from kd_lightning.config.nodes import build
from kd_lightning.data import Augmentation, ZeroPadding
from kd_lightning.data.views import PLAIN
from kd_lightning.distill.optimizers import build_optimizer
from kd_lightning.distill.schedulers import build_schedule
from kd_lightning.schedules import multi_step


def composed(*overrides):
    return api.compose("experiment=crd_pair", "data=digits", *overrides)


@pytest.mark.parametrize(("student", "rate"), [("wrn_16_2", 0.05), ("mobilenetv2", 0.01)])
def test_protocol_of_student_and_teacher(student, rate):
    config = composed(f"student={student}", "teacher=vgg13")
    assert config["data"]["batch_size"] == 64
    assert config["trainer"]["max_epochs"] == config["teacher"]["trainer"]["max_epochs"] == 240
    assert config["trainer"]["gradient_clip_val"] is None
    assert config["teacher"]["trainer"]["gradient_clip_val"] is None
    for part, lr in ((config, rate), (config["teacher"], 0.05)):
        assert part["optimizer"] == {
            "_target_": "torch.optim.SGD", "lr": lr, "momentum": 0.9, "nesterov": False,
            "weight_decay": 5e-4,
        }  # fmt: skip
        rates = epoch_rates(part, epochs=240, steps=11)
        assert rates[0] == rates[149] == pytest.approx(lr)
        assert rates[150] == rates[179] == pytest.approx(lr / 10)
        assert rates[180] == rates[209] == pytest.approx(lr / 100)
        assert rates[210] == rates[239] == pytest.approx(lr / 1000)
    for views in (config["data"]["augmentation"], config["teacher"]["augmentation"]):
        assert type(build(views, "augmentation")) is ZeroPadding


def epoch_rates(section, epochs, steps):
    """The learning rate of each epoch; it must be the same in all of its steps."""
    weights = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = build_optimizer(section["optimizer"], weights, "32-true")
    schedule = build_schedule(section["scheduler"], optimizer, epochs * steps)
    assert schedule.interval == "step"
    rates = []
    for _ in range(epochs):
        inside = []
        for _ in range(steps):
            inside.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.scheduler.step()
        assert len(set(inside)) == 1
        rates += inside[:1]
    return rates


def test_students_of_different_learning_rates_share_a_table():
    students = ("resnet8x4", "shufflenetv1", "shufflenetv2")
    configs = [composed(f"student={student}") for student in students]
    assert [config["optimizer"]["lr"] for config in configs] == [0.05, 0.01, 0.01]
    assert len({config["setting"] for config in configs}) == 1


@pytest.mark.parametrize("wrong", [{"milestones": [150]}, {"milestones": [0.5], "gamma": 0.0}])
def test_impossible_milestones_are_rejected(wrong):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(ValueError, match="above 0"):
        multi_step(optimizer, 240, **wrong)


def test_crops_are_those_of_a_zero_padded_image():
    images = torch.randint(1, 256, (20, 6, 8, 3), dtype=torch.uint8)
    views, index = ZeroPadding(padding=3, seed=5), torch.arange(20)
    view = torch.arange(20) - 1  # the first is PLAIN
    assert view[0] == PLAIN
    rendered = views.render(images, index, view)
    padded = F.pad(images.permute(0, 3, 1, 2), (3, 3, 3, 3))
    top, left, flip = views.parameters(index, view)
    for number in range(20):
        crop = padded[number, :, top[number] :, left[number] :][:, :6, :8]
        expected = crop.flip(2) if flip[number] else crop
        assert torch.equal(rendered[number], expected)
    assert flip.any()
    assert (rendered == 0).any()
    assert rendered.is_contiguous(memory_format=torch.channels_last)
    # Crops and flips are those of the reflecting augmentation.
    inside = rendered != 0
    reflected = Augmentation(padding=3, seed=5).render(images, index, view)
    assert torch.equal(rendered[inside], reflected[inside])


def test_pair_of_unlike_families_trains(tmp_path):
    """By stages and embedding."""
    images = write_folder(tmp_path / "images", size=32)
    metrics = api.run(
        "experiment=crd_pair", "student=mobilenetv2", "student.model.width=0.25",
        "teacher=wrn_16_1", "teacher.model.depth=10", "method=reviewkd", "data=folder",
        "+method.terms.crd={_target_: kd_lightning.losses.CRD, weight: 0.8}",
        f"data.root={images}", "data.batch_size=16", "trainer.max_epochs=1", "pictures=false",
        "teacher.trainer.max_epochs=1", "trainer.accelerator=cpu", f"output_dir={tmp_path}",
        f"data_dir={tmp_path}",
    )  # fmt: skip
    assert metrics["status"] == "finished"
    assert (metrics["student"], metrics["teacher"]) == ("mobilenetv2", "wrn_16_1")
    assert api.load_student(metrics["folder"]).model.roles.pooled == "conv2"
