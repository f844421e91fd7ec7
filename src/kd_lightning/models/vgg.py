"""VGG networks (Simonyan & Zisserman 2015) for small images, with BatchNorm and one linear layer.

Parameter names are those of RepDistiller (Tian et al. 2020), ``models/vgg.py``.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models.initialization import init_convolutions
from kd_lightning.models.roles import Roles

CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions with 64, 128, 256, 512 and 512 channels.

    Args:
        convolutions: number in each block; ``[1, 1, 1, 1, 1]`` is VGG-8, ``[2, 2, 2, 2, 2]``
            VGG-13 (the original has two more linear layers).
        num_classes: number of classes.
        image_size: height and width of the images, in pixels. From 64 on, the last block has half
            the resolution of the one before, as the others always have.

    Stages, each after its ReLU: ``block1`` (H/2), ``block2`` (H/4), ``block3`` (H/8), ``block4``.
    """

    roles = Roles(("block1", "block2", "block3", "block4"), "classifier:input", "classifier")

    def __init__(
        self, convolutions: Sequence[int], num_classes: int = 10, image_size: int = 32
    ) -> None:
        super().__init__()
        if len(convolutions) != len(CHANNELS) or min(convolutions) < 1:
            raise ValueError(f"convolutions must be {len(CHANNELS)} positive numbers")
        inputs = 3
        for number, (count, outputs) in enumerate(zip(convolutions, CHANNELS, strict=True)):
            block = nn.Sequential()
            for _ in range(count):
                block.append(nn.Conv2d(inputs, outputs, 3, padding=1))
                block.append(nn.BatchNorm2d(outputs)).append(nn.ReLU(inplace=True))
                inputs = outputs
            self.add_module(f"block{number}", block)
        self.halved = ("block1", "block2", "block3", *(["block4"] if image_size >= 64 else []))
        self.classifier = nn.Linear(inputs, num_classes)
        init_convolutions(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the map of the last block."""
        x = self.get_submodule("block0")(images)
        for block in self.roles.stages:
            if block in self.halved:
                x = F.max_pool2d(x, 2)
            x = self.get_submodule(block)(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.classifier(self.forward_features(images).mean(dim=(2, 3)))
