"""Wide residual networks: Zagoruyko & Komodakis (2016), section 2.

Parameter names are those of RepDistiller (Tian et al. 2020), ``models/wrn.py``.
"""

from collections import OrderedDict
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models.initialization import init_convolutions
from kd_lightning.models.roles import Roles


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU.

    Where the number of channels changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return residual + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of 16, 32 and 64 channels, times the width, without dropout.

    Args:
        depth: number of convolutions without those of the shortcuts, 6n + 4: 10, 16, 22, 28, 40.
        width: factor of the channels.
        num_classes: number of classes.

    Stages, before the BatchNorm and ReLU that follow them: ``block1`` (H x W), ``block2`` (H/2),
    ``block3`` (H/4). ``relu`` is the last one's activation.
    """

    roles = Roles(("block1", "block2", "block3"), "fc:input", "fc", pooled="relu")

    def __init__(self, depth: int, width: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, 40), not {depth}")
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        for number, (inputs, outputs) in enumerate(pairwise(channels), start=1):
            layer = nn.Sequential(PreActivationBlock(inputs, outputs, 1 if number == 1 else 2))
            for _ in range((depth - 4) // 6 - 1):
                layer.append(PreActivationBlock(outputs, outputs, stride=1))
            self.add_module(f"block{number}", nn.Sequential(OrderedDict(layer=layer)))
        self.bn1 = nn.BatchNorm2d(channels[-1])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels[-1], num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the activated map of the last stage."""
        x = self.conv1(images)
        for stage in self.roles.stages:
            x = self.get_submodule(stage)(x)
        return self.relu(self.bn1(x))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.fc(self.forward_features(images).mean(dim=(2, 3)))
