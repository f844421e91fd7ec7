"""A trained student that predicts classes of images, whatever file it comes from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kd_lightning.config.nodes import Node
from kd_lightning.errors import InputError
from kd_lightning.inference.description import Description
from kd_lightning.inference.images import Images, batches
from kd_lightning.inference.network import PixelNetwork

Runner: TypeAlias = Callable[[Tensor], Tensor]
"""Pixels (B, H, W, 3), uint8 (or float32), to logits (B, C), float32."""

BATCH = 256


@dataclass(frozen=True)
class Student:
    """A trained student with everything needed for inference.

    Images are given as files, Pillow images, uint8 RGB arrays (H, W, 3) of any size, an array
    (B, H, W, 3), or a tensor (B, 3, H, W) of the student's size, uint8 or floating-point in [0, 1]
    (rounded to 8 bits for exported files). They are processed in batches of `batch_size`.

    Attributes:
        description: classes, preprocessing and temperature.
        run: the network; pixels to logits.
        network: the same as a PyTorch module, in evaluation mode; None for `.onnx` and `.pt2`.
        config: configuration of the run; empty for exported files.
    """

    description: Description
    run: Runner
    network: PixelNetwork | None = None
    config: Node = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The PyTorch model; images (B, 3, H, W), as returned by `preprocess`, to logits.

        Raises:
            InputError: it comes from an exported file that does not contain it.
        """
        return self._network().model

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the logits; empty if the run does not store them."""
        return self.description.class_names

    @property
    def image_size(self) -> int:
        """Input height and width, in pixels."""
        return self.description.image_size

    @property
    def mean(self) -> tuple[float, ...]:
        """Per-channel mean of pixel values scaled to [0, 1]."""
        return self.description.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per-channel standard deviation."""
        return self.description.std

    def preprocess(self, images: Images) -> Tensor:
        """Images to the input of `model` (B, 3, H, W), normalised.

        Raises:
            InputError: an image is unreadable or has an unsupported shape or type.
        """
        normalize = self._network().normalize
        parts = [normalize(part) for part in batches(images, self.description, BATCH)]
        return torch.cat(parts) if parts else torch.zeros(0, 3, self.image_size, self.image_size)

    @torch.inference_mode()
    def logits(self, images: Images, batch_size: int = BATCH) -> Tensor:
        """Images to logits (B, C), float32.

        Raises:
            InputError: an image is unreadable or has an unsupported shape or type.
        """
        found = [self.run(part) for part in batches(images, self.description, batch_size)]
        return torch.cat(found) if found else torch.zeros(0, len(self.classes))

    def probabilities(self, images: Images, batch_size: int = BATCH) -> Tensor:
        """Images to probabilities (B, C), calibrated by the temperature; errors as `logits`."""
        return self.calibrated(self.logits(images, batch_size))

    def calibrated(self, logits: Tensor) -> Tensor:
        """Logits (B, C) to probabilities, calibrated by the temperature."""
        return torch.softmax(logits.float() / self.description.temperature, dim=1)

    def predict(self, images: Images, batch_size: int = BATCH) -> list[str]:
        """The most probable class of each image; errors as `logits`."""
        labels = self.logits(images, batch_size).argmax(dim=1).tolist()
        return [self.class_name(label) for label in labels]

    def class_name(self, label: int) -> str:
        """The name of a class, or its index if names are unknown."""
        return self.classes[label] if self.classes else str(label)

    def _network(self) -> PixelNetwork:
        if self.network is None:
            raise InputError(
                "an exported .onnx or .pt2 file has no PyTorch model; load the run, or its "
                ".safetensors file"
            )
        return self.network
