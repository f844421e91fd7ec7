"""The frozen teacher: a network that is listened to and never changed."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.models.features import FeatureReader, Output


class Normalization(NamedTuple):
    """Per-channel mean and standard deviation of pixel values scaled to [0, 1]."""

    mean: Sequence[float]
    std: Sequence[float]


class FrozenTeacher:
    """A teacher in evaluation mode, without gradients, behind a plain call.

    Deliberately not an `nn.Module`: what Lightning does not see as a submodule it cannot put into
    training mode, optimise, save in a checkpoint or synchronise between processes.

    Args:
        model: the network; it is switched to evaluation mode and its parameters are frozen.
        expects: the normalisation the network was trained with.
        given: the normalisation of the images it will be given.
    """

    def __init__(self, model: nn.Module, expects: Normalization, given: Normalization) -> None:
        self.model = model.eval().requires_grad_(False)
        self._reader = FeatureReader(model)
        mean_given, std_given = torch.tensor(given.mean), torch.tensor(given.std)
        mean, std = torch.tensor(expects.mean), torch.tensor(expects.std)
        self._scale = (std_given / std).view(1, 3, 1, 1)
        self._shift = ((mean_given - mean) / std).view(1, 3, 1, 1)
        self._renormalize = expects != given

    def read(self, layers: Collection[str]) -> None:
        """Return the feature maps of these layers with every answer from now on."""
        self._reader.close()
        self._reader = FeatureReader(self.model, layers)

    def prepare(
        self, device: torch.device, memory_format: torch.memory_format, dtype: torch.dtype | None
    ) -> None:
        """Move to the device and lay out the weights for it.

        Args:
            device: where the images will be.
            memory_format: of the convolutions' weights.
            dtype: autocast's type if it is on: convolution and linear weights are converted once,
                to the very values that autocast would convert them to in every step.
        """
        self.model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        if dtype is not None:
            for module in self.model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.to(dtype)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Output:
        """Images (B, 3, H, W), normalised as `given`, to logits and feature maps."""
        if self._renormalize:
            images = images * self._scale + self._shift
        return self._reader(images)
