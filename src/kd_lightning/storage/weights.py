"""Weights of a model as safetensors."""

import hashlib
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.files import replacing
from kd_lightning.storage.checkpoints import fit_state


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights and buffers atomically."""
    with replacing(path) as partial:
        save_file(separate_state(model), partial)


def separate_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights and buffers, contiguous and without shared memory, which safetensors files
    do not support: tied weights are copied.
    """
    state: dict[str, Tensor] = {}
    known: set[int] = set()
    for key, value in model.state_dict().items():
        address = value.untyped_storage().data_ptr()
        state[key] = value.clone() if address in known else value
        state[key] = state[key].contiguous()
        known.add(address)
    return state


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights stored by `RunDirectory.save_weights`.

    Raises:
        InputError: the file is missing, damaged, or does not match the architecture.
    """
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    fit_state(model, state, str(path))


def weights_sha256(model: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 of a model's weights and buffers, in hex.

    Args:
        model: the model.
        without: names of those to leave out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in without:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
