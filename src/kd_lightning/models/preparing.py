"""What a freshly built model needs before it is trained or loaded."""

import itertools

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from kd_lightning.errors import InputError
from kd_lightning.models.trial import blank, evaluation_mode, stand_in


def materialize(model: nn.Module, image_size: int, whose: str = "the model") -> None:
    """Let a model that makes weights on first use (`nn.LazyConv2d`, say) make them now.

    Optimizers, checkpoints and counts must see them. Any other model is left as it is.

    Args:
        model: the model.
        image_size: height and width of the images, in pixels.
        whose: names the model in the message.

    Raises:
        InputError: such a model cannot take such images.
    """
    images = blank(model, image_size)
    if not any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        trial = stand_in(model)
        try:
            with torch.random.fork_rng(devices=[]), evaluation_mode(trial):
                trial(images)
        except Exception:
            return  # not lazy, as far as one can see; `layer_shapes` will tell what is wrong
        if trial.state_dict().keys() == model.state_dict().keys():
            return
    try:
        with evaluation_mode(model):
            model(images)
    except Exception as error:
        raise InputError(cannot_take(whose, image_size, error)) from error


def cannot_take(whose: str, image_size: int, error: Exception) -> str:
    """The sentence for a model that fails on an image."""
    return f"{whose} cannot take images of {image_size}x{image_size} pixels: {error}"


def to_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay out all 4-D weights and buffers of a model, in place.

    `nn.Module.to` does the same, but fails if there are 5-D ones.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=memory_format)
