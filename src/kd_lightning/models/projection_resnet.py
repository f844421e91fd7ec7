"""CIFAR ResNets with projection shortcuts: those of the CIFAR-100 distillation literature.

Sizes and parameter names are those of RepDistiller (Tian et al. 2020), ``models/resnet.py``. They
differ from `CifarResNet` in the shortcuts and in their initialisation.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models.initialization import init_convolutions
from kd_lightning.models.roles import Roles


class ProjectionBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut is a 1x1 convolution and
    BatchNorm (option B of He et al. 2016, section 3.3).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.downsample.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.downsample(x))


class ProjectionResNet(nn.Module):
    """Residual network of three stages for images of 32x32 pixels or more.

    Args:
        depth: number of weighted layers without those of the shortcuts, 6n + 2: 8, 14, 20, 32, ...
        channels: of the first convolution and of the stages; ``[32, 64, 128, 256]`` in the
            networks called resnet8x4 and resnet32x4.
        num_classes: number of classes.

    Stages: ``layer1`` (H x W), ``layer2`` (H/2), ``layer3`` (H/4).
    """

    roles = Roles(("layer1", "layer2", "layer3"), "fc:input", "fc")

    def __init__(
        self, depth: int, channels: Sequence[int] = (16, 16, 32, 64), num_classes: int = 10
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32, 44, 56, 110), not {depth}")
        if len(channels) != 4 or min(channels) < 1:
            raise ValueError(f"channels must be four positive numbers, not {list(channels)}")
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        for number, (inputs, outputs) in enumerate(pairwise(channels), start=1):
            stage = nn.Sequential(ProjectionBlock(inputs, outputs, stride=1 if number == 1 else 2))
            for _ in range((depth - 2) // 6 - 1):
                stage.append(ProjectionBlock(outputs, outputs, stride=1))
            self.add_module(f"layer{number}", stage)
        self.fc = nn.Linear(channels[-1], num_classes)
        init_convolutions(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the map of the last stage."""
        x = F.relu(self.bn1(self.conv1(images)))
        for stage in self.roles.stages:
            x = self.get_submodule(stage)(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.fc(self.forward_features(images).mean(dim=(2, 3)))
