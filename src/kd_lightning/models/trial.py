"""Trial runs of a model without side effects on it."""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.models.outputs import describe

INPUT = ":input"
"""Suffix of a layer name that denotes the layer's input instead of its output."""


class Record(NamedTuple):
    """The outputs of a model and its layers in one forward pass, in order of execution.

    Attributes:
        output: the model's output.
        features: layer name to its output tensor (B, ...), at its last call.
        others: layer name to a description of its output, if not a tensor.
        modified: layers whose output is modified in place by later operations.
    """

    output: Any
    features: dict[str, Tensor]
    others: dict[str, str]
    modified: frozenset[str]


class Onlooker:
    """A read-only forward hook; copies of a model share it."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> "Onlooker":
        return self


@contextmanager
def no_gradients() -> Iterator[None]:
    """Like `torch.no_grad`, and with inference mode off.

    Inference tensors that a model caches (e.g. a position grid) could not be used in training.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the mode of every module on exit."""
    training = {module: module.training for module in model.modules()}
    try:
        with no_gradients():
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def copied(model: nn.Module, share_weights: bool = False) -> nn.Module:
    """A deep copy of a model.

    Non-leaf tensors, which `copy.deepcopy` rejects (a feature stored by the model, a weight
    computed by pruning or weight normalisation), are detached.

    Args:
        model: the model.
        share_weights: whether the copy shares the parameters, to save memory; buffers and other
            attributes are always copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
            elif type(value) in (dict, OrderedDict) and not value:
                # A module has ten without hooks; `copy.deepcopy` is slow with them.
                memo[id(value)] = type(value)()
    if share_weights:
        memo.update({id(parameter): parameter for parameter in model.parameters()})
    return copy.deepcopy(model, memo)


def stand_in(model: nn.Module) -> nn.Module:
    """A copy that shares the weights, or the model itself if it cannot be copied.

    Side effects of a forward pass, on buffers or attributes, are confined to the copy.
    """
    try:
        return copied(model, share_weights=True)
    except Exception:  # copying a model's attributes may raise anything
        return model


def blank(model: nn.Module, image_size: int, batch: int = 2) -> Tensor:
    """Black images (batch, 3, H, W) on the device of the model."""
    device = next(model.parameters(), torch.empty(0)).device
    return torch.zeros(batch, 3, image_size, image_size, device=device)


def record(model: nn.Module, images: Tensor) -> Record:
    """Run a model on images (B, 3, H, W) in evaluation mode, leaving it unchanged."""
    trial = stand_in(model)
    try:
        return _run(trial, images)
    except Exception:
        if trial is model:
            raise
    # A copy does not work if hooks refer to the original model.
    return _run(model, images)


def shapes_at(model: nn.Module, images: Tensor) -> dict[str, tuple[int, ...]]:
    """Output shape of each layer for images (B, 3, H, W) of a size that may be unsupported.

    If the model fails, the shapes up to the failure.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def look(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape)

    with contextlib.suppress(Exception):
        trial = copied(model, share_weights=True)
        with watched(trial, look):
            trial(images)
    return shapes


def _run(model: nn.Module, images: Tensor) -> Record:
    features: dict[str, Tensor] = {}
    others: dict[str, str] = {}
    versions: dict[str, int] = {}

    def look(name: str, output: object) -> None:
        features.pop(name, None)
        others.pop(name, None)
        if isinstance(output, Tensor):
            features[name], versions[name] = output, version(output)
        else:
            others[name] = describe(output)

    with watched(model, look):
        output = model(images)
    changed = (name for name, tensor in features.items() if version(tensor) != versions[name])
    return Record(output, features, others, frozenset(changed))


@contextmanager
def watched(model: nn.Module, look: Callable[[str, object], None]) -> Iterator[None]:
    """Evaluation mode in which `look` is called with the name and output of every layer, and with
    its first input under the name ``"layer:input"``.
    """
    handles = []
    for name, module in model.named_modules(remove_duplicate=False):

        def hook(_module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
            look(name, output)

        def pre_hook(_module: nn.Module, inputs: object, name: str = name) -> None:
            if isinstance(inputs, tuple) and inputs and isinstance(inputs[0], Tensor):
                look(f"{name}{INPUT}", inputs[0])

        handles.append(module.register_forward_hook(hook))
        handles.append(module.register_forward_pre_hook(pre_hook))
    try:
        with torch.random.fork_rng(devices=[]), evaluation_mode(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def version(tensor: Tensor) -> int:
    """Number of in-place modifications of a tensor; 0 for inference tensors (not tracked)."""
    return 0 if tensor.is_inference() else tensor._version
