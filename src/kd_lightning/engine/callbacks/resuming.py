"""State needed for an exact resume beyond what Lightning restores."""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kd_lightning.distill.module import DistillationModule


class ExactResume(Callback):
    """Restores the random state and the position within the epoch.

    Views and image order need no random state, as they are functions of index, seed and epoch; but
    layers such as dropout draw random numbers during training.
    """

    def __init__(self) -> None:
        self._generators: dict[str, Tensor] = {}
        self._loader: dict[str, int] = {}
        self._stopped = False

    def state_dict(self) -> dict[str, Any]:
        """The state of torch's generators, of the CPU and of every GPU."""
        gpus = {
            f"cuda:{number}": torch.cuda.get_rng_state(number)
            for number in range(torch.cuda.device_count())
        }
        return {"cpu": torch.get_rng_state(), **gpus}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Defer restoring until training starts, as setup may draw random numbers, too."""
        self._generators = state_dict

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save `should_stop` and the training metrics of the epoch so far."""
        checkpoint["should_stop"] = trainer.should_stop
        metrics = cast(DistillationModule, module).train_metrics
        checkpoint["train_metrics"] = {name: m.metric_state for name, m in metrics.items()}

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Do not continue a training that early stopping has ended."""
        trainer.should_stop = trainer.should_stop or self._stopped

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the training metrics; keep the loader state and `should_stop` for later."""
        saved = checkpoint.get("train_metrics", {})
        for name, metric in cast(DistillationModule, module).train_metrics.items():
            for key, value in metric.metric_state.items():
                if isinstance(value, Tensor) and key in saved.get(name, {}):
                    setattr(metric, key, saved[name][key].to(value.device))
        self._stopped = checkpoint.get("should_stop", False)
        loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        self._loader = loaders[0] if loaders else {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Restore the random generators and the position in the data loader."""
        for device, state in self._generators.items():
            if device == "cpu":
                torch.set_rng_state(state.cpu())
            elif torch.device(device).index < torch.cuda.device_count():
                torch.cuda.set_rng_state(state.cpu(), device)
        if self._loader:
            # Lightning does not restore a loader that it has already created to count batches.
            loader: Any = trainer.train_dataloader
            loader.load_state_dict(self._loader)
