"""Networks whose code needs contiguous images, in every part of a run and afterwards."""

import torch
from test_resume import configuration
from torch import nn

from kd_lightning import api
from kd_lightning.workflows import student as training


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
    student = api.load_student(tmp_path / "run", trust=["test_memory_format"])
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert student.probabilities(pixels.numpy()).shape == (2, 3)
