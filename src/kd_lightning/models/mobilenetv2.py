"""MobileNetV2 (Sandler et al. 2018, section 4) for small images.

It has fewer strided layers than for ImageNet; with images of 32x32 pixels the last map is 2x2.
Sizes and parameter names are those of RepDistiller (Tian et al. 2020), ``models/mobilenetv2.py``.
"""

from typing import NamedTuple

from torch import Tensor, nn

from kd_lightning.models.initialization import init_convolutions
from kd_lightning.models.roles import Roles


class _Stage(NamedTuple):
    """Blocks of one width; only the first has the stride."""

    channels: int
    blocks: int
    stride: int


STAGES = (
    _Stage(16, 1, 1), _Stage(24, 2, 1), _Stage(32, 3, 2), _Stage(64, 4, 2), _Stage(96, 3, 1),
    _Stage(160, 3, 2), _Stage(320, 1, 1),
)  # fmt: skip
STEM, HEAD = 32, 1280


class InvertedResidual(nn.Module):
    """Expansion by a 1x1 convolution, depthwise 3x3 convolution, linear 1x1 projection.

    With a shortcut where the shape does not change.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *_convolution(inputs, width),
            *_convolution(width, width, kernel=3, stride=stride, groups=width),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        return x + self.conv(x) if self.shortcut else self.conv(x)


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class MobileNetV2(nn.Module):
    """Seven stages of inverted residual blocks, between a 3x3 and a 1x1 convolution.

    Args:
        width: factor of the channels, except those of the last convolution where it is below 1;
            the literature on distillation uses 0.5.
        expansion: factor of the channels inside a block.
        num_classes: number of classes.

    Stages: ``blocks.1`` (H/2), ``blocks.2`` (H/4), ``blocks.4`` (H/8), ``blocks.6`` (H/16).
    """

    roles = Roles(
        ("blocks.1", "blocks.2", "blocks.4", "blocks.6"),
        "classifier.0:input",
        "classifier.0",
        pooled="conv2",
    )

    def __init__(self, width: float = 0.5, expansion: int = 6, num_classes: int = 10) -> None:
        super().__init__()
        if width * STAGES[0].channels < 1 or expansion < 1:
            raise ValueError("width must be at least 0.0625, and expansion at least 1")
        inputs = int(STEM * width)
        self.conv1 = _convolution(3, inputs, kernel=3, stride=2)
        self.blocks = nn.Sequential()
        for stage in STAGES:
            blocks = nn.Sequential()
            for number in range(stage.blocks):
                outputs = int(stage.channels * width)
                stride = stage.stride if number == 0 else 1
                inner = expansion if len(self.blocks) else 1
                blocks.append(InvertedResidual(inputs, outputs, stride, inner))
                inputs = outputs
            self.blocks.append(blocks)
        outputs = int(HEAD * max(1.0, width))
        self.conv2 = _convolution(inputs, outputs)
        self.classifier = nn.Sequential(nn.Linear(outputs, num_classes))
        init_convolutions(self)
        for parameter in self.classifier.parameters():
            nn.init.normal_(parameter, std=0.01 if parameter.ndim > 1 else 0.0)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the map of the last convolution."""
        return self.conv2(self.blocks(self.conv1(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.classifier(self.forward_features(images).mean(dim=(2, 3)))
