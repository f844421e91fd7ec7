"""Steps `ReduceLROnPlateau` before the epoch's checkpoint is written."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kd_lightning.distill.module import DistillationModule


class StepOnPlateau(Callback):
    """Steps the scheduler with the validation loss, or accuracy if the mode is ``max``.

    Lightning steps it after the checkpoint, so that a resumed training would miss the step.
    """

    def __init__(self) -> None:
        self._results: dict[str, float] = {}  # of the last validation, and its epoch

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Record the results of a validation that is part of the training."""
        if trainer.state.fn is not TrainerFn.FITTING:
            return
        results = cast(DistillationModule, module).val_metrics.compute()
        self._results = {name: float(value) for name, value in results.items()}
        self._results["epoch"] = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Step the scheduler, if the epoch was validated."""
        scheduler: Any = module.lr_schedulers()
        if (
            isinstance(scheduler, ReduceLROnPlateau)
            and self._results.get("epoch") == trainer.current_epoch
        ):
            name = "val/accuracy" if scheduler.mode == "max" else "val/loss"
            scheduler.step(self._results[name])

    def state_dict(self) -> dict[str, Any]:
        """The results of the last validation, which may be in the middle of an epoch."""
        return dict(self._results)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the results."""
        self._results = state_dict
