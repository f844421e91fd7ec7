"""The CIFAR ResNets of He et al. (2016), section 4.2, with 20, 32, 44, 56, ... layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models.roles import Roles


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (the paper's option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            # Zeros on both sides of the channel axis, as in the widely used public checkpoints.
            before = self.new_channels // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(residual + shortcut)


class CifarResNet(nn.Module):
    """Residual network for 32x32 images: three stages of 16, 32, 64 channels.

    Args:
        depth: number of weighted layers, 6n + 2: 20, 32, 44, 56, 110.
        num_classes: number of classes.

    Stages: ``layer1`` (32x32), ``layer2`` (16x16), ``layer3`` (8x8).
    """

    roles = Roles(("layer1", "layer2", "layer3"), "linear:input", "linear")

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (20, 32, 44, 56, 110), not {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the map of the last stage."""
        x = F.relu(self.bn1(self.conv1(images)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.linear(self.forward_features(images).mean(dim=(2, 3)))
