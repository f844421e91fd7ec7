"""Exponential moving average of the student's weights."""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kd_lightning.distill.module import DistillationModule


class AverageWeights(Callback):
    """Validates, and keeps at the end, an exponential moving average of the student's weights and
    of BatchNorm's running statistics (Polyak & Juditsky 1992).

    Lightning's `EMAWeightAveraging` would copy the whole module, with the teacher, and its
    weights-only checkpoints contain the weights that were not validated.

    Args:
        decay: weight of the previous average in each optimizer step, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        self._combine = get_ema_multi_avg_fn(decay)
        self._others: dict[str, Tensor] = {}  # the averages; while they are in use, the weights
        self._in_use = False
        self._steps = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start with the initial weights, unless resumed."""
        weights = _weights(module)
        if not self._others:
            self._others = {name: weight.clone() for name, weight in weights.items()}
        self._others = {name: self._others[name].to(weight) for name, weight in weights.items()}
        self._use(module, averages=False)

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Continue with the weights after a validation."""
        self._use(module, averages=False)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the averages after an optimizer step."""
        if trainer.global_step > self._steps:
            weights = _weights(module)
            self._combine(list(self._others.values()), list(weights.values()), 0)
            self._steps = trainer.global_step

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Use the averages until the next step: the best epoch is saved in between."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._use(module, averages=True)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep the averages, also if a resumed training was already complete."""
        self._use(module, averages=True)

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the averages beside the weights."""
        checkpoint["average"] = {
            "others": self._others, "in_use": self._in_use, "steps": self._steps
        }  # fmt: skip

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the averages."""
        saved = checkpoint["average"]
        self._others, self._in_use, self._steps = saved["others"], saved["in_use"], saved["steps"]

    @torch.no_grad()
    def _use(self, module: LightningModule, averages: bool) -> None:
        """Exchange weights and averages in the student, unless it has the right ones."""
        if self._in_use == averages:
            return
        for name, weight in _weights(module).items():
            other = self._others[name].to(weight, copy=True)
            self._others[name].copy_(weight)
            weight.copy_(other)
        self._in_use = averages


def _weights(module: LightningModule) -> dict[str, Tensor]:
    """The student's floating-point parameters and buffers, by name; shared ones once."""
    student = cast(DistillationModule, module).student
    state = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    return {name: value.detach() for name, value in state.items() if value.is_floating_point()}
