"""ResNet-9 (Page 2018, "How to train your ResNet"): a compact residual network, a strong teacher
that trains on a CPU.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models.roles import Roles


def _convolution(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
    if pool:
        # Before BatchNorm and ReLU, which then process a quarter of the pixels.
        block.append(nn.MaxPool2d(2))
    return block.append(nn.BatchNorm2d(outputs)).append(nn.ReLU(inplace=True))


class Residual(nn.Sequential):
    """A sequence of modules with an identity shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return x + super().forward(x)


class ResNet9(nn.Module):
    """Eight convolutions and a linear layer: 32 -> 64 -> 128 -> 256 channels at the default width.

    Args:
        width: channels of the first convolution; 32 gives 1.6 million parameters, 64 (Page) 6.6.
        num_classes: number of classes.
        logit_scale: constant that the linear layer's output is multiplied by (Page: 0.125).

    Stages: ``stem`` (H x W), ``stage1`` (H/2), ``stage2`` (H/4), ``stage3`` (H/8).
    """

    roles = Roles(("stem", "stage1", "stage2", "stage3"), "linear:input", "linear")

    def __init__(self, width: int = 32, num_classes: int = 10, logit_scale: float = 0.125) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        self.logit_scale = logit_scale
        self.stem = _convolution(3, width)
        self.stage1 = self._stage(width, 2 * width, residual=True)
        self.stage2 = self._stage(2 * width, 4 * width, residual=False)
        self.stage3 = self._stage(4 * width, 8 * width, residual=True)
        self.linear = nn.Linear(8 * width, num_classes, bias=False)

    @staticmethod
    def _stage(inputs: int, outputs: int, residual: bool) -> nn.Sequential:
        stage = nn.Sequential(_convolution(inputs, outputs, pool=True))
        if residual:
            stage.append(Residual(_convolution(outputs, outputs), _convolution(outputs, outputs)))
        return stage

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), H and W multiples of 8, to the map of the last stage."""
        return self.stage3(self.stage2(self.stage1(self.stem(images))))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), H and W multiples of 8, to logits (B, num_classes)."""
        x = F.adaptive_max_pool2d(self.forward_features(images), 1).flatten(1)
        return self.linear(x) * self.logit_scale
