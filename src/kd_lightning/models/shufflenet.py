"""ShuffleNets for small images: V1 (Zhang et al. 2018) and V2 (Ma et al. 2018).

The first convolution has a 1x1 kernel and stride 1, and there is no pooling after it. Sizes and
parameter names are those of RepDistiller (Tian et al. 2020), ``models/ShuffleNetv1.py`` and
``models/ShuffleNetv2.py``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models.roles import Roles

STEM = 24
"""Channels of the first convolution."""


def _pointwise(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class GroupedBlock(nn.Module):
    """Block of V1 (figure 2): grouped 1x1 convolution, shuffle, depthwise 3x3, grouped 1x1.

    With stride 2, the average-pooled input is concatenated; otherwise it is added.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        added = outputs - inputs if stride == 2 else outputs
        width = added // 4
        first = groups if inputs != STEM else 1  # section 3.2: too few channels for groups
        self.conv1 = _pointwise(inputs, width, first)
        self.bn1 = nn.BatchNorm2d(width)
        self.shuffle = nn.ChannelShuffle(first)
        self.conv2 = _depthwise(width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _pointwise(width, added, groups)
        self.bn3 = nn.BatchNorm2d(added)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        residual = self.shuffle(F.relu(self.bn1(self.conv1(x))))
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        if self.pool is None:
            return F.relu(residual + x)
        return F.relu(torch.cat([residual, self.pool(x)], dim=1))


class ShuffleNetV1(nn.Module):
    """Three stages of `GroupedBlock`; the first of each halves the resolution.

    Args:
        channels: of the stages; these must be multiples of four times the groups.
        blocks: number of blocks in each stage.
        groups: of the 1x1 convolutions.
        num_classes: number of classes.

    Stages: ``layer1`` (H/2), ``layer2`` (H/4), ``layer3`` (H/8).
    """

    roles = Roles(("layer1", "layer2", "layer3"), "linear:input", "linear")

    def __init__(
        self,
        channels: Sequence[int] = (240, 480, 960),
        blocks: Sequence[int] = (4, 8, 4),
        groups: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if not len(channels) == len(blocks) == 3 or min(blocks) < 1:
            raise ValueError("channels and blocks must be three positive numbers each")
        self.conv1 = _pointwise(3, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        inputs = STEM
        for number, (outputs, count) in enumerate(zip(channels, blocks, strict=True), start=1):
            stage = nn.Sequential(GroupedBlock(inputs, outputs, 2, groups))
            for _ in range(count - 1):
                stage.append(GroupedBlock(outputs, outputs, 1, groups))
            self.add_module(f"layer{number}", stage)
            inputs = outputs
        self.linear = nn.Linear(inputs, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the map of the last stage."""
        x = F.relu(self.bn1(self.conv1(images)))
        for stage in self.roles.stages:
            x = self.get_submodule(stage)(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.linear(self.forward_features(images).mean(dim=(2, 3)))


class SplitBlock(nn.Module):
    """Basic block of V2 (figure 3c): half of the channels pass unchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = _pointwise(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _depthwise(half, stride=1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _pointwise(half, half), nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        same, changed = x.chunk(2, dim=1)
        changed = F.relu(self.bn1(self.conv1(changed)))
        changed = self.bn2(self.conv2(changed))
        changed = F.relu(self.bn3(self.conv3(changed)))
        return self.shuffle(torch.cat([same, changed], dim=1))


class DownBlock(nn.Module):
    """Block of V2 that halves the resolution (figure 3d), with two branches."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1, self.bn1 = _depthwise(inputs, stride=2), nn.BatchNorm2d(inputs)
        self.conv2, self.bn2 = _pointwise(inputs, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _pointwise(inputs, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _depthwise(half, stride=2), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _pointwise(half, half), nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / 2, W / 2)."""
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return self.shuffle(torch.cat([left, right], dim=1))


class ShuffleNetV2(nn.Module):
    """Three stages, each of a `DownBlock` and several `SplitBlock`, and a 1x1 convolution.

    Args:
        channels: of the stages, and of the last convolution; even numbers.
        blocks: number of `SplitBlock` in each stage.
        num_classes: number of classes.

    Stages: ``layer1`` (H/2), ``layer2`` (H/4), ``layer3`` (H/8).
    """

    roles = Roles(("layer1", "layer2", "layer3"), "linear:input", "linear", pooled="relu")

    def __init__(
        self,
        channels: Sequence[int] = (116, 232, 464, 1024),
        blocks: Sequence[int] = (3, 7, 3),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if len(channels) != 4 or len(blocks) != 3 or any(number % 2 for number in channels):
            raise ValueError("channels must be four even numbers, and blocks three numbers")
        self.conv1 = _pointwise(3, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        inputs = STEM
        for number, (outputs, count) in enumerate(zip(channels, blocks, strict=False), start=1):
            stage = nn.Sequential(DownBlock(inputs, outputs))
            for _ in range(count):
                stage.append(SplitBlock(outputs))
            self.add_module(f"layer{number}", stage)
            inputs = outputs
        self.conv2 = _pointwise(inputs, channels[-1])
        self.bn2 = nn.BatchNorm2d(channels[-1])
        self.relu = nn.ReLU()
        self.linear = nn.Linear(channels[-1], num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the map of the last convolution."""
        x = F.relu(self.bn1(self.conv1(images)))
        for stage in self.roles.stages:
            x = self.get_submodule(stage)(x)
        return self.relu(self.bn2(self.conv2(x)))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.linear(self.forward_features(images).mean(dim=(2, 3)))
