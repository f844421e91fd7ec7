"""A network that takes 8-bit pixels: normalisation and student in one module."""

import torch
from torch import Tensor, nn

from kd_lightning.inference.description import Description
from kd_lightning.models.outputs import find_logits
from kd_lightning.models.preparing import takes_channels_last, to_memory_format


class PixelNetwork(nn.Module):
    """Pixels to logits.

    The input has the layout of Pillow, NumPy and OpenCV, which is the channels-last layout that
    convolutions prefer on a CPU, so that no copy is made.

    Args:
        model: images (B, 3, H, W), normalised, to logits (B, C); set to evaluation mode and
            converted to channels-last, unless its code needs contiguous images.
        description: its preprocessing.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, description: Description) -> None:
        super().__init__()
        self.model = model
        mean, std = torch.tensor([description.mean, description.std], dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())
        self.num_classes = len(description.class_names) or None
        self.eval()
        self._contiguous = not takes_channels_last(model, description.image_size)
        if not self._contiguous:
            to_memory_format(model, torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, H, W, 3), RGB, 0 to 255, of any type, to logits (B, C), float32."""
        return find_logits(self.model(self.normalize(pixels)), self.num_classes).float()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (B, H, W, 3), 0 to 255, to the model's input (B, 3, H, W)."""
        images = (pixels.float() * self.scale + self.shift).permute(0, 3, 1, 2)
        return images.contiguous() if self._contiguous else images
