"""ResNets of bottleneck blocks (He et al. 2016, section 4.1) for small images.

The first convolution has a 3x3 kernel and stride 1, and there is no pooling after it. Sizes and
parameter names are those of RepDistiller (Tian et al. 2020), ``models/resnetv2.py``.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models.initialization import init_convolutions
from kd_lightning.models.roles import Roles

EXPANSION = 4
"""Output channels of a block, relative to those of its 3x3 convolution."""


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution; where the shape changes, the shortcut is a 1x1
    convolution and BatchNorm.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return F.relu(residual + self.shortcut(x))


class BottleneckResNet(nn.Module):
    """Residual network of four stages of 256, 512, 1024 and 2048 channels at the default width.

    Args:
        blocks: number of blocks in each stage; ``[3, 4, 6, 3]`` is ResNet-50.
        width: channels of the first convolution.
        num_classes: number of classes.

    Stages: ``layer1`` (H x W), ``layer2`` (H/2), ``layer3`` (H/4), ``layer4`` (H/8).
    """

    roles = Roles(("layer1", "layer2", "layer3", "layer4"), "linear:input", "linear")

    def __init__(
        self, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, num_classes: int = 10
    ) -> None:
        super().__init__()
        if len(blocks) != 4 or min(blocks) < 1 or width < 1:
            raise ValueError("blocks must be four positive numbers, and width positive")
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for number, count in enumerate(blocks):
            stage = nn.Sequential()
            for block in range(count):
                stride = 2 if number > 0 and block == 0 else 1
                stage.append(Bottleneck(inputs, width * 2**number, stride))
                inputs = EXPANSION * width * 2**number
            self.add_module(f"layer{number + 1}", stage)
        self.linear = nn.Linear(inputs, num_classes)
        init_convolutions(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the map of the last stage."""
        x = F.relu(self.bn1(self.conv1(images)))
        for stage in self.roles.stages:
            x = self.get_submodule(stage)(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.linear(self.forward_features(images).mean(dim=(2, 3)))
