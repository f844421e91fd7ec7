"""The frozen teacher: a network that is listened to and never changed."""

import copy
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.models.features import FeatureReader, Output
from kd_lightning.models.folding import fold_batchnorm


class Normalization(NamedTuple):
    """Per-channel mean and standard deviation of pixel values scaled to [0, 1]."""

    mean: Sequence[float]
    std: Sequence[float]


class FrozenTeacher:
    """A teacher in evaluation mode, without gradients, behind a plain call.

    Deliberately not an `nn.Module`: what Lightning does not see as a submodule it cannot put into
    training mode, optimise, save in a checkpoint or synchronise between processes.

    Args:
        model: the network; it is switched to evaluation mode and its parameters are frozen. What
            answers is a copy of it, made for speed by `prepare`; the model itself stays as it is.
        expects: the normalisation the network was trained with.
        given: the normalisation of the images it will be given.
    """

    def __init__(self, model: nn.Module, expects: Normalization, given: Normalization) -> None:
        self.model = model.eval().requires_grad_(False)
        self._layers: Collection[str] = ()
        self._logits = True
        self._prepared: tuple[Any, ...] | None = None
        mean_given, std_given = torch.tensor(given.mean), torch.tensor(given.std)
        mean, std = torch.tensor(expects.mean), torch.tensor(expects.std)
        self._scale = (std_given / std).view(1, 3, 1, 1)
        self._shift = ((mean_given - mean) / std).view(1, 3, 1, 1)
        self._renormalize = expects != given
        self._use(model)

    def read(self, layers: Collection[str], logits: bool = True) -> None:
        """What `answer` returns from now on.

        Args:
            layers: those whose feature maps are wanted.
            logits: whether the logits are; if not, nothing after the last layer is computed.
        """
        self._layers, self._logits, self._prepared = layers, logits, None
        self._reader.close()
        self._use(self.model)

    def prepare(
        self, device: torch.device, memory_format: torch.memory_format, dtype: torch.dtype | None
    ) -> None:
        """Make the copy that answers: on the device, normalisations folded, laid out for speed.

        Args:
            device: where the images will be.
            memory_format: of the convolutions' weights.
            dtype: autocast's type if it is on: convolution and linear weights are converted once,
                to the very values that autocast would convert them to in every step.
        """
        if self._prepared == (device, memory_format, dtype):
            return
        self._reader.close()
        network = copy.deepcopy(self.model)
        fold_batchnorm(network, keep=self._layers)
        network.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        if dtype is not None:
            for module in network.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.to(dtype)
        self._use(network)
        self._prepared = (device, memory_format, dtype)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised as `given`, to logits (B, C)."""
        return self._reader(self._normalize(images), complete=True).logits

    @torch.inference_mode()
    def answer(self, images: Tensor) -> Output:
        """Images (B, 3, H, W), normalised as `given`, to what `read` asked for."""
        return self._reader(self._normalize(images))

    def _normalize(self, images: Tensor) -> Tensor:
        return images * self._scale + self._shift if self._renormalize else images

    def _use(self, network: nn.Module) -> None:
        self._reader = FeatureReader(network, self._layers, logits=self._logits)
