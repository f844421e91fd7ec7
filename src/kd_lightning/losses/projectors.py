"""Trained projections of the student's maps to the teacher's channels."""

import torch.nn.functional as F
from torch import Tensor, nn


class ProjectorNorm(nn.BatchNorm2d):
    """BatchNorm that also accepts a single value per channel in training.

    For a single image with maps of 1x1, `nn.BatchNorm2d` raises an error in training, since a
    single value has no variance. There the running statistics are used, and not updated: the last
    batch of an epoch may be that small.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


def convolution_norm(inputs: int, outputs: int, kernel: int = 1) -> nn.Sequential:
    """A convolution that keeps the size of the map, and BatchNorm.

    Without a bias, which BatchNorm would cancel.

    Args:
        inputs: number of channels.
        outputs: number of channels.
        kernel: height and width of the kernel; odd.
    """
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), ProjectorNorm(outputs)
    )
