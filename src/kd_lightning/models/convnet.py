"""Plain ConvNets: a few 3x3 convolutions, one pooling step, two linear layers.

The model sizes are those of the results table of the original project, "Knowledge Distillation on
CIFAR-10 Dataset".
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.models.roles import Roles


class Flatten(nn.Module):
    """`nn.Flatten` whose gradient has the memory format of its input.

    The gradient of a linear layer has the memory order of its weights. Combined with a
    channels-last map, every operation on it (the derivative of the activation, the sum with the
    gradient of an attention term) would access memory in two different orders. One copy is cheaper
    (docs/performance.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C * H * W)."""
        if torch.is_grad_enabled() and x.requires_grad:
            x = _SameFormatBack.apply(x)
        return x.flatten(1)


class _SameFormatBack(torch.autograd.Function):
    """The identity; its gradient is converted to the memory format of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last)
        ctx.format = torch.channels_last if last else torch.contiguous_format
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous(memory_format=ctx.format)


class ConvNet(nn.Module):
    """Plain convolutional network; the original project's students and teacher are four sizes.

    ``channels=[16, 32], hidden=64`` has 530,090 parameters, ``[32, 64], 128`` has 2,117,962,
    ``[48, 96], 256`` has 6,337,194, and the teacher's ``[64, 128, 256], 512`` has 33,930,890
    (ten classes, 32x32 images).

    The original table gives the sizes but not the position of the single pooling step, which does
    not affect parameter counts; it is set by `pool_after`. Early pooling is better: after 12 epochs
    on CIFAR-10 without a teacher (and before gradients were clipped) the small student has 75.07 %
    on the test set and the medium one 79.66 %, against 74.35 % and 78.12 % with pooling after the
    second convolution (validation: 75.78 and 80.48 against 75.22 and 78.92), and it trains about
    twice as fast (one seed; 15,600 and 6,900 images a second against 8,500 and 2,900 on two CPU
    cores).

    Args:
        channels: output channels of each convolution.
        hidden: width of the hidden linear layer.
        num_classes: number of classes.
        image_size: height and width of the images, in pixels; even.
        pool_after: number (from 1) of the convolution followed by 2x2 max-pooling.

    Stages: ``stage1``, ``stage2``, ..., each after its activation. Embedding: the hidden layer.
    """

    def __init__(
        self,
        channels: Sequence[int],
        hidden: int,
        num_classes: int = 10,
        image_size: int = 32,
        pool_after: int = 1,
    ) -> None:
        super().__init__()
        if not channels or min(channels) < 1 or hidden < 1 or num_classes < 2:
            raise ValueError("channels and hidden must be positive, num_classes at least 2")
        if image_size < 2 or image_size % 2:
            raise ValueError(f"image_size must be an even number of pixels, not {image_size}")
        if not 1 <= pool_after <= len(channels):
            raise ValueError(f"pool_after must be from 1 to {len(channels)}, not {pool_after}")
        self.roles = Roles(
            tuple(f"stage{number}" for number in range(1, len(channels) + 1)),
            "classifier.3:input",
            "classifier.3",
        )
        for number, (inputs, outputs) in enumerate(pairwise([3, *channels]), start=1):
            stage = nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1))
            if number == pool_after:
                stage.append(nn.MaxPool2d(2))
            # After pooling, on a quarter of the values: max-pooling commutes with ReLU.
            stage.append(nn.ReLU(inplace=True))
            self.add_module(f"stage{number}", stage)
        self.classifier = nn.Sequential(
            Flatten(),
            nn.Linear(channels[-1] * (image_size // 2) ** 2, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the map of the last stage."""
        x = images
        for stage in self.roles.stages:
            x = self.get_submodule(stage)(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.classifier(self.forward_features(images))
