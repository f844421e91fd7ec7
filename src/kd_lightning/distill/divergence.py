"""Detection of divergence: losses or weights that are not finite."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LossWatch:
    """Records non-finite losses on the device, without synchronising at every step.

    The losses are summed on the device: a sum is not finite if one of its terms is not.

    Args:
        scaled: float16 with a gradient scaler, which skips steps that are not finite. The training
            has then diverged only if all of its steps are skipped.
    """

    def __init__(self, scaled: bool = False) -> None:
        self.scaled = scaled
        self._names: tuple[str, ...] = ()
        self._kept: Tensor | None = None

    def note(self, names: Iterable[str], values: Tensor) -> None:
        """Record the losses of a step (N,), detached, with N names, the same in every step."""
        self._names = tuple(names)
        if self.scaled:
            values = values.isfinite()
            self._kept = values if self._kept is None else self._kept | values
        else:
            self._kept = values if self._kept is None else self._kept + values

    def look(self) -> list[str]:
        """Return the names of the losses that were not finite since the last call."""
        if self._kept is None:
            return []
        finite = (self._kept if self.scaled else self._kept.isfinite()).tolist()
        self._kept = None
        return [name for name, good in zip(self._names, finite, strict=True) if not good]


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a NaN or infinite value, if any."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    if not named or torch.stack([tensor.isfinite().all() for _, tensor in named]).all():
        return None  # a single synchronisation
    return next(name for name, tensor in named if not tensor.isfinite().all())


def trainable(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The trainable parameters; others, such as masks, may be infinite on purpose."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
