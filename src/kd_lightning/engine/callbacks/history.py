"""Per-epoch results, the rows of `history.csv`."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.distill.module import DistillationModule

VALIDATION = ("val_accuracy", "val_loss")


class History(Callback):
    """Collects training accuracy, validation results and speed of every epoch.

    Attributes:
        rows: one per epoch.
        validated_at: step of the last validation in this process; -1: none.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.validated_at = -1

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Record the step of the validated weights."""
        self.validated_at = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Add the epoch's row."""
        accuracy = cast(DistillationModule, module).train_metrics.compute()["train/accuracy"]
        row = {"epoch": trainer.current_epoch + 1, "train_accuracy": accuracy}
        logged = trainer.callback_metrics
        if self.validated_at == trainer.global_step:
            row |= {name: logged[f"val/{name.removeprefix('val_')}"] for name in VALIDATION}
        row["images_per_second"] = logged["images_per_second"]
        self.rows.append({name: round(float(value), 6) for name, value in row.items()})

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows."""
        self.rows = state_dict["rows"]
