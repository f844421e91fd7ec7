"""Notice a training that has diverged: losses or weights that are not finite."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LossWatch:
    """Remembers whether a loss was not finite, where the loss is, until somebody looks.

    Looking at a number on an accelerator waits for it. The losses are added up there instead: a sum
    is not finite if one of its summands is not.

    Args:
        scaled: float16 with a gradient scaler, which skips steps that are not finite. Only a
            training all of whose steps are skipped has diverged.
    """

    def __init__(self, scaled: bool = False) -> None:
        self.scaled = scaled
        self._names: tuple[str, ...] = ()
        self._kept: Tensor | None = None

    def note(self, names: Iterable[str], values: Tensor) -> None:
        """Remember the losses of a step (N,), detached; N names, the same in every step."""
        self._names = tuple(names)
        if self.scaled:
            values = values.isfinite()
            self._kept = values if self._kept is None else self._kept | values
        else:
            self._kept = values if self._kept is None else self._kept + values

    def look(self) -> list[str]:
        """The names of the losses that were not finite since the last look."""
        if self._kept is None:
            return []
        finite = (self._kept if self.scaled else self._kept.isfinite()).tolist()
        self._kept = None
        return [name for name, good in zip(self._names, finite, strict=True) if not good]


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a NaN or infinite value, if there is one."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    if not named or torch.stack([tensor.isfinite().all() for _, tensor in named]).all():
        return None  # having waited for the device once
    return next(name for name, tensor in named if not tensor.isfinite().all())


def trainable(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The parameters that are trained: a mask may be infinite on purpose."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
