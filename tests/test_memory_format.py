"""Networks whose code needs contiguous images, in every part of a run and afterwards."""

import torch
from test_resume import configuration
from torch import nn

from kd_lightning import api
from kd_lightning.models.preparing import takes_channels_last
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows import student as training
from kd_lightning.workflows.evaluate import evaluate
from kd_lightning.workflows.measure import measure


class Flattening(nn.Module):
    """`Tensor.view` fails on channels-last maps, which convolutions of such images return."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width * 16 * 16, 3)

    def forward(self, images):
        return self.linear(self.norm(self.conv(images)).relu().view(images.shape[0], -1))


def test_contiguous_run_and_its_student(tmp_path, caplog):
    config = configuration(
        tmp_path, "method=logit", "trainer.memory_format=contiguous", "trainer.max_epochs=1",
        "teacher.trainer.max_epochs=1", "update_bn=true",
    )  # fmt: skip
    for part in ("student", "teacher"):
        config[part]["model"] = {"_target_": "test_memory_format.Flattening"}
        config[part]["layers"] = []
    metrics = training.run(config, tmp_path / "run")
    assert metrics["status"] == "finished"
    assert "not cached" not in caplog.text
    directory = RunDirectory(tmp_path / "run")
    trained = directory.read_config()
    trained["trainer"]["memory_format"] = "auto"  # as trained where that is not channels-last
    directory.write_config(trained)
    trust = ["test_memory_format"]
    assert evaluate(tmp_path / "run", trust=trust)["accuracy"] == metrics["test_accuracy"]
    ((_, figures),) = measure([tmp_path / "run"], seconds=0.01, trust=trust)
    assert figures["teacher_latency_1_one_thread_p50"] > 0
    student = api.load_student(tmp_path / "run", trust=["test_memory_format"])
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert student.probabilities(pixels.numpy()).shape == (2, 3)


class PerChannel(nn.Module):
    """`Tensor.view` merges images and channels, which one channels-last image allows."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images):
        maps = self.conv(images)
        return maps.view(-1, maps[0, 0].numel()).mean(dim=1).view(len(images), -1)


class Rearranging(Flattening):
    """Its convolution returns channels-last maps because of its weights only."""

    def forward(self, images):
        return super().forward(images.contiguous())


def test_which_networks_take_channels_last_images():
    assert not takes_channels_last(Rearranging(), 16)
    assert takes_channels_last(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), 8)
    assert not takes_channels_last(Flattening(), 16)
    assert not takes_channels_last(PerChannel(), 8)
