"""Running a model on trial images without leaving a trace in it."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.models.outputs import describe

INPUT = ":input"
"""What follows a layer's name if what it is given is meant, not what it puts out."""


class Record(NamedTuple):
    """What a model and its layers put out in one forward pass, in order of execution.

    Attributes:
        output: what the model returned.
        features: layer name to the tensor it put out, (B, ...), at its last use.
        others: layer name to a description of what it put out, if that is not a tensor.
        modified: layers whose output is modified in place by what follows.
    """

    output: Any
    features: dict[str, Tensor]
    others: dict[str, str]
    modified: frozenset[str]


class Onlooker:
    """A forward hook that changes nothing; a copied model has the same one."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> "Onlooker":
        return self


@contextmanager
def no_gradients() -> Iterator[None]:
    """As `torch.no_grad`, and never in inference mode.

    An inference tensor that a model keeps (a position grid, say) could not be trained with later.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; afterwards every module is in the mode it was in."""
    training = {module: module.training for module in model.modules()}
    try:
        with no_gradients():
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def copied(model: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a model.

    Tensors with a history, which `copy.deepcopy` refuses (a feature that the model stores, the
    weight that pruning or weight normalisation computes), are copied without it.

    Args:
        model: the model.
        share_weights: whether the copy has the same parameters, so that it costs no memory; its
            buffers and other attributes are its own all the same.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    if share_weights:
        memo.update({id(parameter): parameter for parameter in model.parameters()})
    return copy.deepcopy(model, memo)


def stand_in(model: nn.Module) -> nn.Module:
    """A copy that shares the weights, or the model itself if it cannot be copied.

    What a forward pass leaves behind, in buffers or attributes, stays in the copy.
    """
    try:
        return copied(model, share_weights=True)
    except Exception:  # whatever a model's own attributes may raise
        return model


def blank(model: nn.Module, image_size: int, batch: int = 2) -> Tensor:
    """Black images (batch, 3, H, W) on the device of the model."""
    device = next(model.parameters(), torch.empty(0)).device
    return torch.zeros(batch, 3, image_size, image_size, device=device)


def record(model: nn.Module, images: Tensor) -> Record:
    """Run images (B, 3, H, W) through a model in evaluation mode; leave the model as it was."""
    trial = stand_in(model)
    try:
        return _run(trial, images)
    except Exception:
        if trial is model:
            raise
    # Hooks of its own may refer to the model, so that a copy of it does not work.
    return _run(model, images)


def shapes_at(model: nn.Module, images: Tensor) -> dict[str, tuple[int, ...]]:
    """Shape of what each layer puts out for images (B, 3, H, W) that the model may not take.

    If it does not, the shapes until it failed.
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
    """Evaluation mode in which `look` is shown the name and output of every layer that runs, and
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
    """How often a tensor has been modified in place; 0 for inference tensors, which do not say."""
    return 0 if tensor.is_inference() else tensor._version
