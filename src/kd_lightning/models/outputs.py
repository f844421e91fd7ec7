"""Extraction of the logits from a model's output."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from torch import Tensor

from kd_lightning.errors import InputError


def find_logits(output: Any, num_classes: int | None = None, whose: str = "the model") -> Tensor:
    """Find the logits (B, num_classes) in the output of a model.

    A tensor is returned unchanged. In other outputs, the logits are the entry ``logits`` (of a
    dict, named tuple or Hugging Face ``ModelOutput``), else the first element (``(logits,
    features)``, ``(logits, auxiliary logits)``), else the only tensor of the right shape.

    Args:
        output: the model's output.
        num_classes: number of classes; None accepts any 2-D tensor, and any single tensor.
        whose: name of the model in the message.

    Raises:
        InputError: no tensor, or more than one, could be the logits.
    """

    def fits(value: Any) -> TypeGuard[Tensor]:
        is_matrix = isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()
        return is_matrix and num_classes in (None, value.shape[1])

    if fits(output) or (isinstance(output, Tensor) and num_classes is None):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else _attribute(output, "logits")
    if fits(named):
        return named
    if isinstance(output, tuple | list) and output and fits(output[0]):
        return output[0]
    found = [tensor for tensor in _tensors(output) if fits(tensor)]
    if len({id(tensor) for tensor in found}) == 1:
        return found[0]
    classes = "the" if num_classes is None else f"the {num_classes}"
    which = f", in which {len(found)} matrices could be the logits" if found else ""
    raise InputError(
        f"{whose} must return logits (images, classes) for {classes} classes, "
        f"but it returns {describe(output)}{which}"
    )


def describe(value: Any) -> str:
    """Describe a value for messages: a tensor's shape, a container's elements."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    kind = type(value).__name__
    if isinstance(value, Mapping):
        parts = [f"{key}: {describe(part)}" for key, part in value.items()]
    elif isinstance(value, tuple | list):
        parts = [describe(part) for part in value]
    else:
        return kind
    shown = ", ".join(parts[:4]) + (", ..." if len(parts) > 4 else "")
    return f"{kind}({shown})"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors(list(vars(value).values()))


def _attribute(value: Any, name: str) -> Any:
    return None if isinstance(value, Tensor) else getattr(value, name, None)
