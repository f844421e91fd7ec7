"""Exported students agree with the original, for every model family of the project and of timm."""

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning.errors import RunError
from kd_lightning.inference.description import Description
from kd_lightning.inference.exported import read_onnx, read_pt2, trace, write_onnx, write_pt2
from kd_lightning.inference.network import PixelNetwork
from kd_lightning.models import (
    VGG,
    BottleneckResNet,
    CifarResNet,
    ConvNet,
    MobileNetV2,
    ProjectionResNet,
    ResNet9,
    ShuffleNetV1,
    ShuffleNetV2,
    WideResNet,
)
from kd_lightning.models.preparing import materialize
from kd_lightning.models.reused_classifier import ReusedClassifier

SIZE = 32


def timm_model(name, **settings):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=10, **settings)


FAMILIES = {
    "convnet": lambda: ConvNet([4, 8], 8),
    "cifar_resnet": lambda: CifarResNet(8),
    "resnet9": lambda: ResNet9(4),
    "reused_classifier": lambda: ReusedClassifier(ConvNet([4, 8], 8), channels=16, size=8),
    "projection_resnet": lambda: ProjectionResNet(8, num_classes=10),
    "bottleneck_resnet": lambda: BottleneckResNet((1, 1, 1, 1), 16, num_classes=10),
    "wide_resnet": lambda: WideResNet(10, 1, num_classes=10),
    "vgg": lambda: VGG([1] * 5, num_classes=10),
    "mobilenetv2": lambda: MobileNetV2(num_classes=10),
    "shufflenet_v1": lambda: ShuffleNetV1(num_classes=10),
    "shufflenet_v2": lambda: ShuffleNetV2(num_classes=10),
    "resnet10t": lambda: timm_model("resnet10t"),
    "mobilenetv3_small_050": lambda: timm_model("mobilenetv3_small_050"),
    "vit_tiny_patch16_224": lambda: timm_model("vit_tiny_patch16_224", img_size=SIZE),
}


def trained(name):
    """A model with the statistics and the magnitudes of a trained one."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    materialize(model, SIZE)
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(16, 3, SIZE, SIZE))
    return model


@pytest.mark.slow  # test_shipping.py exports a ConvNet in every suite
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_agree(name, tmp_path):
    names = tuple(f"class {number}" for number in range(10))
    description = Description(names, SIZE, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    network = PixelNetwork(trained(name), description)
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)
    )
    with torch.no_grad():
        expected = network(pixels)
    program = trace(network, SIZE)
    write_onnx(program, description, tmp_path / "student.onnx")
    write_pt2(program, description, tmp_path / "student.pt2")
    for read, path in ((read_onnx, "student.onnx"), (read_pt2, "student.pt2")):
        run, known = read(tmp_path / path)
        assert known == description
        for count in (7, 1):
            torch.testing.assert_close(
                run(pixels[:count]).detach(), expected[:count], atol=1e-4, rtol=0
            )


class FixedBatch(nn.Module):
    """A model that works for two images only."""

    def forward(self, images):
        return images.reshape(2, -1)[:, :10]


def test_models_with_a_fixed_batch_size_are_rejected():
    description = Description((), SIZE, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(RunError, match="variable batch size"):
        trace(PixelNetwork(FixedBatch(), description), SIZE)


class NamedOutput(nn.Module):
    """A model that returns more than logits, as those of Hugging Face."""

    def forward(self, images):
        pooled = images.mean((2, 3))
        return {"hidden": images, "logits": pooled}


class Flattening(nn.Module):
    """A model whose `Tensor.view` needs contiguous maps."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4 * 6 * 6, 3)

    def forward(self, images):
        return self.linear(self.conv(images).relu().view(images.shape[0], -1))


def test_models_that_need_contiguous_images_are_exported(tmp_path):
    description = Description(("a", "b", "c"), 8, (0.5,) * 3, (0.5,) * 3)
    model = Flattening()
    pixels = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    expected = model((pixels.permute(0, 3, 1, 2).contiguous() / 255 - 0.5) / 0.5)
    network = PixelNetwork(model, description)
    torch.testing.assert_close(network(pixels), expected)
    write_pt2(trace(network, 8), description, tmp_path / "student.pt2")
    torch.testing.assert_close(read_pt2(tmp_path / "student.pt2")[0](pixels), expected)


def test_logits_are_found_in_the_output(tmp_path):
    description = Description(("a", "b", "c"), 8, (0.0,) * 3, (1.0,) * 3)
    network = PixelNetwork(NamedOutput(), description)
    write_pt2(trace(network, 8), description, tmp_path / "student.pt2")
    pixels = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    expected = pixels.float().mean((1, 2)) / 255
    torch.testing.assert_close(read_pt2(tmp_path / "student.pt2")[0](pixels), expected)
