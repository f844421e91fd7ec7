"""Preparation of a newly built model for training or loading."""

import itertools
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kd_lightning.errors import InputError
from kd_lightning.models.trial import blank, copied, evaluation_mode, stand_in


def materialize(model: nn.Module, image_size: int, whose: str = "the model") -> None:
    """Initialise lazily created weights (e.g. of `nn.LazyConv2d`) by a forward pass.

    Optimizers, checkpoints and parameter counts need them. Other models are left unchanged.

    Args:
        model: the model.
        image_size: height and width of the images, in pixels.
        whose: name of the model in the message.

    Raises:
        InputError: the model is lazy and fails on images of this size, or its state cannot be
            stored.
    """
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{whose} cannot be stored: its state contains {key}, which is not a tensor but of "
                f"type {type(value).__name__}"
            )
    parts: list[Any] = [model.named_modules, model.named_parameters, model.named_buffers]
    for name in (name for part in parts for name, _ in part(remove_duplicate=False)):
        if re.search(r"[\"'\\\n\r]", name):  # torch generates programs that contain the names
            raise InputError(
                f"{whose} has a module or weight of the name {name!r}; quotes, backslashes and "
                "line ends are not supported"
            )
    images = blank(model, image_size)
    if not any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        trial = stand_in(model)
        try:
            with torch.random.fork_rng(devices=[]), evaluation_mode(trial):
                trial(images)
        except Exception:
            return  # apparently not lazy; `layer_shapes` will report the error
        if trial.state_dict().keys() == model.state_dict().keys():
            return
    try:
        with evaluation_mode(model):
            model(images)
    except Exception as error:
        raise InputError(cannot_take(whose, image_size, error)) from error


def cannot_take(whose: str, image_size: int, error: Exception) -> str:
    """Error message for a model that fails on an image."""
    return f"{whose} cannot take images of {image_size}x{image_size} pixels: {error}"


def to_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Convert all 4-D weights and buffers of a model to a memory format, in place.

    Like `nn.Module.to`, which fails if there are 5-D tensors.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=memory_format)


def takes_channels_last(model: nn.Module, image_size: int) -> bool:
    """Whether a model takes channels-last images; `Tensor.view` may fail on their maps."""
    images = blank(model, image_size).contiguous(memory_format=torch.channels_last)
    try:
        trial = copied(model)
        to_memory_format(trial, torch.channels_last)
    except Exception:  # copying a model's attributes may raise anything
        trial = model
    try:
        with torch.random.fork_rng(devices=[]), evaluation_mode(trial):
            trial(images)
    except Exception:  # if there is another reason, it is found where the model is used
        return False
    return True


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W), float, to (B, 3, size, size): bilinear, with antialiasing."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


class ResizeInput:
    """A forward pre-hook that resizes the images of a network, which has no state of its own.

    Args:
        size: height and width.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Resize the first input."""
        return (resize(inputs[0], self.size), *inputs[1:])
